"""The same rules on a real tokenizer: 262,144 pieces with byte fallback, out of a GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.core.errors import UsageError
from farflung.engine.catalog import CATALOG, assemble
from farflung.text.detokenize import Detokenizer
from farflung.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PROSE = "Hello  world, Größe 世界 😀👩\u200d👩\u200d👧 ꙮ\U0001f9ff\n\n\n\tfor i in range(10): <b>bold</b>"


@pytest.fixture(scope="module")
def weights() -> Path:
    return assemble(CATALOG["gemma3-270m"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def gemma(weights: Path, cache: Path) -> Tokenizer:
    return Tokenizer(str(weights.parent), arguments(weights), cache=cache)


def arguments(weights: Path) -> dict[str, str]:
    """With the type given, transformers need not read the file a second time, slowly, to find it (17 s)."""
    return {"gguf_file": weights.name, "tokenizer_type": "gemma3_text"}


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()


def test_a_text_comes_back_and_begins_with_the_token_the_model_wants(gemma: Tokenizer) -> None:
    ids = gemma.encode(PROSE)
    assert ids[0] == 2  # <bos>
    assert gemma.decode(ids) == streamed(gemma, ids) == PROSE
    assert 1 in gemma.eos_token_ids  # <eos>
    assert gemma.vocab_size == 262_144


def test_the_base_model_has_no_chat_template(gemma: Tokenizer) -> None:
    with pytest.raises(UsageError, match="base model"):
        gemma.encode_chat([{"role": "user", "content": "hello"}])


def test_the_cached_tokenizer_is_the_one_that_was_built(gemma: Tokenizer, weights: Path, cache: Path) -> None:
    again = Tokenizer(str(weights.parent), arguments(weights), cache=cache)
    assert again.encode(PROSE) == gemma.encode(PROSE)
    assert again.eos_token_ids == gemma.eos_token_ids


@settings(deadline=None, max_examples=300)
@given(text=st.text(max_size=60))
def test_any_text_streams_as_it_was(gemma: Tokenizer, text: str) -> None:
    ids = gemma.encode(text)
    assert streamed(gemma, ids) == gemma.decode(ids)


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.one_of(st.integers(0, 262_200), st.integers(236, 500)), max_size=60))
def test_any_ids_stream_as_they_decode(gemma: Tokenizer, ids: list[int]) -> None:
    assert streamed(gemma, ids) == gemma.decode(ids)

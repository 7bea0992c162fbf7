from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import PIPELINES, write_folder

from farflung.text.detokenize import Detokenizer
from farflung.text.tokenizer import Tokenizer

TEXTS = [
    "the dog",
    "  two spaces,  and the dog. ",
    "Größe 世界你好 😀👩\u200d👩\u200d👧 ꙮ\n\n\nПривет",
    "naïve \ufffd character <tool> </s> end",
    "",
]
LENIENT = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


def streamed(tokenizer: Tokenizer, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_decoded_text(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert "".join(streamed(small, ids)) == small.decode(ids)


@LENIENT
@given(data=st.data())
def test_streamed_text_is_the_decoded_text_for_any_ids_at_all(small: Tokenizer, data: st.DataObject) -> None:
    """Bytes that are no UTF-8, special tokens, ids that no token has."""
    fragments = st.integers(0, 270)  # mostly single bytes, in all three vocabularies
    ids = data.draw(st.lists(st.one_of(st.integers(0, small.vocab_size + 3), fragments, fragments), max_size=80))
    assert "".join(streamed(small, ids)) == small.decode(ids)


@LENIENT
@given(text=st.text())
def test_no_part_of_a_character_is_ever_given_out(small: Tokenizer, text: str) -> None:
    pieces = streamed(small, small.encode(text))
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@LENIENT
@given(data=st.data())
def test_byte_level_text_is_given_out_but_for_one_unfinished_character(
    small_tokenizers: dict[str, Tokenizer], data: st.DataObject
) -> None:
    tokenizer = small_tokenizers["byte-level"]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    detokenizer, given_out = Detokenizer(tokenizer), ""
    for count, token in enumerate(ids, start=1):
        given_out += detokenizer.push(token)
        known = tokenizer.decode(ids[:count])
        assert given_out in (known, known.removesuffix("\ufffd"))


def test_a_character_comes_with_its_last_byte(small_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = small_tokenizers["byte-level"]
    ids = tokenizer.encode("ᚠ")  # three bytes that no merge joins
    assert streamed(tokenizer, ids) == ["", "", "ᚠ", ""]


def test_a_run_of_byte_tokens_comes_with_the_token_after_it(small_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = small_tokenizers["sentencepiece"]
    ids = tokenizer.encode("a世b")[1:]
    assert streamed(tokenizer, ids) == ["", "a", "", "", "", "世b", ""]


def test_a_text_that_continues_a_prompt_keeps_its_leading_space(small_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = small_tokenizers["sentencepiece"]
    prompt, answer = tokenizer.encode("the"), tokenizer.encode("dog")[1:]
    assert "".join(streamed(tokenizer, answer)) == "dog"
    assert "".join(streamed(tokenizer, answer, context=prompt)) == " dog"


class Counting(Tokenizer):
    """Counts the tokens it decodes."""

    decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return super().decode(ids)


@pytest.mark.parametrize("kind", sorted(PIPELINES))
@pytest.mark.parametrize("what", ["the dog, the dog. ", "世", "\ufffd", "bad bytes"])
def test_a_long_text_costs_a_bounded_number_of_decoded_tokens_per_token(kind: str, what: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, PIPELINES[kind]())
    tokenizer = Counting(str(folder), {}, cache=folder / "cache")
    ids = [tokenizer.encode("é")[-1]] * 4000 if what == "bad bytes" else tokenizer.encode(what * 1000)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
    assert tokenizer.decoded / len(ids) < 70

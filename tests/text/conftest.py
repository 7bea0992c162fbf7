from __future__ import annotations

import pytest
from small_tokenizers import PIPELINES, TEMPLATE, write_folder

from farflung.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """One small tokenizer of each kind."""
    folders = {kind: write_folder(tmp_path_factory.mktemp(kind), make(), TEMPLATE) for kind, make in PIPELINES.items()}
    return {kind: Tokenizer(str(folder), {}, cache=folder / "cache") for kind, folder in folders.items()}


@pytest.fixture(scope="session", params=sorted(PIPELINES))
def small(request: pytest.FixtureRequest, small_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    """Each of them in turn."""
    return small_tokenizers[request.param]

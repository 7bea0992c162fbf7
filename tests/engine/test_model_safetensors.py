"""The header of a safetensors file, sound and damaged."""

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model
from safetensors.torch import load_file, save_file

from farflung.core.errors import CorruptWeights, FarflungError, UnsupportedModel
from farflung.engine.open_model import open_source
from farflung.engine.safetensors_file import read_header
from farflung.engine.safetensors_source import SafetensorsSource


def small_file(folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file({"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0)}, path)
    return path


def with_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_the_header_gives_the_bytes_that_the_library_reads(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    expected = load_file(path)
    found = {tensor.name: tensor for tensor in read_header(path)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == tuple(value.shape)
        assert bytes(found[name].read_bytes()) == value.contiguous().view(torch.uint8).numpy().tobytes()


@given(st.data())
@settings(max_examples=60)
def test_a_file_cut_anywhere_is_refused_with_its_size(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = small_file(Path(folder))
        whole = path.read_bytes()
        kept = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:kept])
        with pytest.raises(CorruptWeights, match=str(kept)):
            read_header(path)


@given(st.data())
@settings(max_examples=200)
def test_a_damaged_header_raises_only_our_errors(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = small_file(Path(folder))
        damaged = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(damaged) - 1))
            damaged[place] = data.draw(st.integers(0, 255))
        path.write_bytes(damaged)
        with contextlib.suppress(FarflungError):
            read_header(path)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(9)),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        ({"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}, bytes(8)),
        ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, bytes(8)),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        (
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            bytes(4),
        ),
        ([1, 2], b""),
        (b"\xff" * 10, b""),
    ],
)
def test_a_header_that_contradicts_itself_or_the_file_is_refused(tmp_path: Path, header: object, data: bytes) -> None:
    with pytest.raises(CorruptWeights):
        read_header(with_header(tmp_path / "x.safetensors", header, data))


def test_an_announced_header_larger_than_the_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptWeights, match=str(2**60)):
        read_header(path)


def test_an_unknown_element_type_is_named(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    with pytest.raises(UnsupportedModel, match="F4"):
        read_header(with_header(tmp_path / "x.safetensors", header, b"x"))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a\\b", "gone.safetensors"])
def test_an_index_may_only_name_files_that_lie_beside_it(tmp_path: Path, name: str) -> None:
    path = tiny_model("llama", tmp_path / "m", shard="200KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptWeights, match="weight file"):
        open_source(str(path))


def test_a_tensor_that_the_index_promises_and_the_shard_lacks_is_named(tmp_path: Path) -> None:
    path = tiny_model("llama", tmp_path / "m", shard="200KB")
    shard = next(iter(path.glob("model-00001*.safetensors")))
    with_header(shard, {})
    with pytest.raises(CorruptWeights, match="promises"):
        open_source(str(path), cache=tmp_path).manifest()


def test_a_file_that_shrinks_after_it_was_opened_is_found(tmp_path: Path) -> None:
    path = tiny_model("llama", tmp_path / "m")
    source = SafetensorsSource.of_folder(path, cache=tmp_path)
    stored = max(source.stored(), key=lambda tensor: tensor.offset)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(stored.offset + 4)
    with pytest.raises(CorruptWeights, match=stored.name):
        source.read(stored)


def test_the_tokens_that_end_a_text_come_from_the_generation_configuration(tmp_path: Path) -> None:
    path = tiny_model("llama", tmp_path / "m")
    (path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert open_source(str(path)).eos_token_ids() == (7, 9)
    (path / "generation_config.json").unlink()
    assert open_source(str(path)).eos_token_ids() == (2,)


def test_a_manifest_is_remembered_until_a_file_changes(tmp_path: Path) -> None:
    path = tiny_model("llama", tmp_path / "m")
    cache = tmp_path / "cache"
    seen: list[str] = []
    first = open_source(str(path), cache=cache).manifest(progress=lambda what, done, total: seen.append(what))
    assert seen
    seen.clear()
    assert open_source(str(path), cache=cache).manifest(progress=lambda what, done, total: seen.append(what)) == first
    assert not seen
    (path / "generation_config.json").write_text("{}")
    assert open_source(str(path), cache=cache).manifest().digest != first.digest
    for remembered in (cache / "manifests").iterdir():
        remembered.write_bytes(b"spoiled")
    (path / "generation_config.json").write_text("{}")
    assert open_source(str(path), cache=cache).manifest().leaves

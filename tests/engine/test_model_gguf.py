"""GGUF files: the same parameters as transformers makes of them, and damaged files refused."""

import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_gguf
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from farflung.core.errors import CorruptWeights, FarflungError, NotAModel, UnsupportedModel
from farflung.core.model import LayerRange
from farflung.engine.catalog import CATALOG, missing_packages
from farflung.engine.dequant import VALUES_PER_PIECE, dequantise
from farflung.engine.gguf_file import read_header
from farflung.engine.gguf_source import GgufSource
from farflung.engine.loader import load_stage
from farflung.engine.open_model import open_source
from farflung.engine.skeleton import build_skeleton

TYPES = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]


def theirs(path: Path, config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=build_skeleton(config), torch_dtype=dtype)
    tensors: dict[str, torch.Tensor] = loaded["tensors"]
    return tensors


def assert_equal_to_transformers(source: GgufSource, dtype: torch.dtype) -> None:
    config = source.config()
    stage = load_stage(source, LayerRange(0, config.num_hidden_layers), dtype, expected_digest=source.manifest().digest)
    ours, expected = stage.model.state_dict(), theirs(source.path, config, dtype)
    assert ours.keys() - expected.keys() <= set(stage.model.all_tied_weights_keys)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
        assert ours[name].dtype == value.dtype, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_every_parameter_is_bit_for_bit_what_transformers_makes_of_the_file(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    path = tiny_gguf(family, tmp_path / "m.gguf", types=("Q8_0", "F32", "Q5_0", "F16", "Q4_0", "BF16"))
    assert_equal_to_transformers(GgufSource(path, cache=tmp_path), dtype)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_the_configuration_is_the_one_transformers_reads_from_the_whole_file(tmp_path: Path, family: str) -> None:
    path = tiny_gguf(family, tmp_path / "m.gguf")
    expected = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    found = GgufSource(path).config()
    found.name_or_path = expected.name_or_path
    assert found.to_dict() == expected.to_dict()
    assert found.vocab_size == 5000


def test_a_stage_of_a_gguf_file_holds_only_its_layers(tmp_path: Path) -> None:
    source = GgufSource(tiny_gguf("qwen2", tmp_path / "m.gguf"), cache=tmp_path)
    stage = load_stage(source, LayerRange(1, 3), torch.float32)
    assert len(stage.layers) == 2
    assert stage.nbytes == 2 * 4 * sum(p.numel() for p in stage.layers[0].parameters())
    assert source.eos_token_ids() == (2,)
    assert source.tokenizer_arguments() == (str(tmp_path), {"gguf_file": "m.gguf", "local_files_only": True})


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantising_in_pieces_changes_no_value(kind: gguf.GGMLQuantizationType, dtype: torch.dtype) -> None:
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = 3 * VALUES_PER_PIECE // (2 * block_values)
    raw = np.random.default_rng(3).integers(0, 256, (rows, block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(raw.reshape(1, -1), kind)).reshape(rows, block_values).to(dtype)
        found = dequantise(bytearray(raw.tobytes()), kind.name, (rows, block_values), dtype)
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert torch.equal(found.isnan(), expected.isnan())


def test_every_known_tensor_type_has_a_size() -> None:
    assert set(gguf.GGMLQuantizationType) <= gguf.GGML_QUANT_SIZES.keys()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_is_refused_with_the_numbers(whole_file: Path, data: st.DataObject) -> None:
    whole = whole_file.read_bytes()
    kept = data.draw(st.one_of(st.integers(0, len(whole) - 64), st.integers(0, 4000)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.gguf")
        path.write_bytes(whole[:kept])
        with pytest.raises((CorruptWeights, NotAModel), match=str(kept)):
            GgufSource(path)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_front_raises_only_our_errors(whole_file: Path, data: st.DataObject) -> None:
    damaged = bytearray(whole_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 4000))] = data.draw(st.sampled_from([0, 1, 8, 9, 127, 255]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.gguf")
        path.write_bytes(damaged)
        try:
            source = GgufSource(path)
            build_skeleton(source.config())
        except FarflungError:
            pass


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf("qwen2", tmp_path_factory.mktemp("gguf") / "m.gguf", layers=1, tokens=20)


def test_a_tensor_that_transformers_would_ignore_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 1, "embedding_length": 32, "context_length": 64, "vocab_size": 10}.items():
        writer.add_uint32(f"llama.{key}", value)
    for key, value in {"attention.head_count": 2, "attention.head_count_kv": 2, "feed_forward_length": 64}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        load_stage(GgufSource(path), LayerRange(0, 1), torch.float32)


def test_an_architecture_that_transformers_cannot_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "spoon")
    writer.add_tensor("token_embd.weight", np.ones((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="spoon"):
        GgufSource(path).config()


def test_a_forged_number_of_layers_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(2**31)
    writer.add_tensor("token_embd.weight", np.ones((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=str(2**31)):
        GgufSource(path)


def test_the_digest_tells_configuration_tokenizer_and_weights_apart(tmp_path: Path) -> None:
    first = GgufSource(tiny_gguf("qwen2", tmp_path / "a.gguf"), cache=tmp_path).manifest()
    other_weights = GgufSource(tiny_gguf("qwen2", tmp_path / "b.gguf", seed=1), cache=tmp_path).manifest()
    other_tokens = GgufSource(tiny_gguf("qwen2", tmp_path / "c.gguf", tokens=5001), cache=tmp_path).manifest()
    kinds = {"config": first.leaf("config", "gguf metadata"), "tokenizer": first.leaf("tokenizer", "gguf metadata")}
    assert other_weights.digest != first.digest
    assert other_weights.leaf("config", "gguf metadata") == kinds["config"]
    assert other_weights.leaf("tokenizer", "gguf metadata") == kinds["tokenizer"]
    assert other_tokens.leaf("config", "gguf metadata") == kinds["config"]
    assert other_tokens.leaf("tokenizer", "gguf metadata") != kinds["tokenizer"]


def test_a_file_that_is_no_gguf_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"hello, this is a text and no model")
    with pytest.raises(NotAModel, match=r"m\.gguf"):
        open_source(str(tmp_path / "m.gguf"))
    with pytest.raises(NotAModel):
        read_header(tmp_path / "absent.gguf")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "dtype"), [("gemma3-270m", torch.float32), ("qwen2.5-coder-0.5b", torch.bfloat16)], ids=str)
def test_real_weights_are_bit_for_bit_what_transformers_loads(name: str, dtype: torch.dtype) -> None:
    if missing := missing_packages(CATALOG[name]):
        pytest.skip(f"the weights of {name} are not installed: {missing[0]}")
    source = open_source(name)
    assert isinstance(source, GgufSource)
    assert_equal_to_transformers(source, dtype)

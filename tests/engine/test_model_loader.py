"""Stages from safetensors folders: what they hold, that they compute what the whole model does, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from models import FAMILIES, tiny_model, whole_model
from safetensors.torch import load_file, save_file

from farflung.core.errors import CorruptWeights, DigestMismatch, NotAModel, UnsupportedModel, UsageError
from farflung.core.ids import ModelDigest
from farflung.core.model import LayerRange
from farflung.engine.loader import StageModule, load_stage
from farflung.engine.open_model import open_source
from farflung.engine.source import ModelSource

SPLIT = (LayerRange(0, 2), LayerRange(2, 5), LayerRange(5, 6))


def source_of(path: Path) -> ModelSource:
    return open_source(str(path), cache=path.parent / "cache")


def run(stages: list[StageModule], ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1])[None]
    rows = None
    with torch.inference_mode():
        for stage in stages:
            rows = stage.embed(ids) if stage.embed is not None else rows
            rows = stage.base(inputs_embeds=rows, position_ids=positions, use_cache=False).last_hidden_state
        assert stages[-1].head is not None
        return stages[-1].head(rows)


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied-head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_one_after_another_compute_exactly_what_the_whole_model_does(tmp_path: Path, family: str, tied: bool) -> None:
    path = tiny_model(family, tmp_path / family, tie_word_embeddings=tied, shard="300KB")
    source = source_of(path)
    digest = source.spec().digest
    stages = [load_stage(source, layers, torch.float32, attention=None, expected_digest=digest) for layers in SPLIT]
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = whole_model(path)(input_ids=ids, use_cache=False).logits
    assert torch.equal(run(stages, ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_stage_in_bf16_has_the_weights_transformers_loads(tmp_path: Path, family: str) -> None:
    path = tiny_model(family, tmp_path / family)
    stage = load_stage(source_of(path), LayerRange(0, 6), torch.bfloat16)
    ours, theirs = stage.model.state_dict(), whole_model(path, torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        assert ours[name].dtype == value.dtype


def test_a_stage_holds_and_reads_only_its_share(tmp_path: Path) -> None:
    path = tiny_model("qwen2", tmp_path / "m", tie_word_embeddings=True)
    source = source_of(path)
    read: list[int] = []
    middle = load_stage(source, SPLIT[1], torch.float32, progress=lambda what, done, total: read.append(total))
    held = {name for name, value in middle.model.named_parameters() if value.device.type != "meta"}
    assert held == {f"model.layers.{index}.{rest}" for index in range(3) for rest in _names_of_a_layer()}
    assert middle.nbytes == read[-1] == 3 * 4 * sum(p.numel() for p in middle.layers[0].parameters())
    assert [layer.self_attn.layer_idx for layer in middle.layers] == [2, 3, 4]
    assert middle.embed is None
    assert middle.norm is None
    assert middle.head is None
    last = load_stage(source, SPLIT[2], torch.float32)
    assert last.embed is None
    assert last.head is not None  # a tied head holds the embedding's tensor without the embedding
    assert last.head.weight.shape == (320, 128)


def _names_of_a_layer() -> set[str]:
    attention = {f"self_attn.{p}_proj.{k}" for p in "qkv" for k in ("weight", "bias")} | {"self_attn.o_proj.weight"}
    return (
        attention
        | {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
        | {
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
        }
    )


def test_a_tied_head_shares_the_memory_of_the_embedding(tmp_path: Path) -> None:
    stage = load_stage(source_of(tiny_model("gemma3_text", tmp_path / "m")), LayerRange(0, 6), torch.float32)
    assert stage.embed is not None
    assert stage.head is not None
    assert stage.embed.weight is stage.head.weight


def test_a_head_stored_with_other_values_than_the_embedding_is_not_tied(tmp_path: Path) -> None:
    path = tiny_model("qwen2", tmp_path / "m", tie_word_embeddings=False)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    stage = load_stage(source_of(path), LayerRange(5, 6), torch.float32)
    assert stage.head is not None
    assert torch.equal(stage.head.weight, whole_model(path).lm_head.weight)


def test_sliding_layers_keep_their_place_in_the_pattern(tmp_path: Path) -> None:
    stage = load_stage(source_of(tiny_model("gemma3_text", tmp_path / "m", layers=12)), LayerRange(5, 8), torch.float32)
    assert stage.base.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert [layer.self_attn.is_sliding for layer in stage.layers] == [False, True, True]
    assert stage.config.num_hidden_layers == 12


def test_layers_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"4:9.*has 6"):
        load_stage(source_of(tiny_model("llama", tmp_path / "m")), LayerRange(4, 9), torch.float32)


def test_the_digest_is_that_of_the_bytes_not_of_their_split_into_files(tmp_path: Path) -> None:
    one = tiny_model("llama", tmp_path / "one")
    many = tiny_model("llama", tmp_path / "many", shard="200KB")
    other = tiny_model("llama", tmp_path / "other", seed=1)
    assert len(list(many.glob("*.safetensors"))) > 2
    assert source_of(one).spec().digest == source_of(many).spec().digest
    assert source_of(one).spec().digest != source_of(other).spec().digest


def test_another_model_than_the_one_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch, match="aaaaaaaa"):
        load_stage(
            source_of(tiny_model("llama", tmp_path / "m")), SPLIT[0], torch.float32, expected_digest=ModelDigest("a" * 64)
        )


def test_a_byte_changed_behind_the_remembered_manifest_is_found_when_its_stage_loads(tmp_path: Path) -> None:
    import os

    path = tiny_model("llama", tmp_path / "m")
    digest = source_of(path).spec().digest
    weights = path / "model.safetensors"
    before = weights.stat()
    tensor = {t.name: t for t in source_of(path).stored()}["model.layers.3.mlp.up_proj.weight"]
    with weights.open("r+b") as file:
        file.seek(tensor.offset + 10)
        file.write(b"\xff")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    load_stage(source_of(path), SPLIT[0], torch.float32, expected_digest=digest)  # layers 0 and 1 are as they were
    with pytest.raises(CorruptWeights, match=r"layers\.3\.mlp\.up_proj"):
        load_stage(source_of(path), SPLIT[1], torch.float32, expected_digest=digest)


def test_a_configuration_changed_after_the_manifest_was_given_is_found(tmp_path: Path) -> None:
    path = tiny_model("llama", tmp_path / "m")
    manifest = source_of(path).manifest()
    manifest.save(path / "farflung-manifest.json")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert source_of(path).manifest().digest == manifest.digest
    with pytest.raises(CorruptWeights, match=r"config\.json"):
        load_stage(source_of(path), SPLIT[0], torch.float32, expected_digest=manifest.digest)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "config.json"),
        ({"config.json": '{"model_type": "llama"}'}, "model.safetensors"),
        ({"config.json": "{}", "model.safetensors": ""}, "model_type"),
    ],
)
def test_a_folder_that_is_no_model_says_what_was_looked_for(tmp_path: Path, files: dict[str, str], found: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(NotAModel, match=found):
        open_source(str(tmp_path))


def test_pickled_weights_are_not_read_and_the_hint_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(NotAModel) as raised:
        open_source(str(tmp_path))
    assert "safetensors" in raised.value.hint


def test_a_name_that_leads_nowhere_is_refused_with_the_list() -> None:
    with pytest.raises(NotAModel) as raised:
        open_source("no-such-model")
    assert "gemma3-270m" in raised.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "spoon"},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "six"},
        {"num_hidden_layers": 0},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 5},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"model_type": "bert"},
        {"model_type": "qwen3_moe"},
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_split_right_is_refused_by_name(tmp_path: Path, change: dict[str, object]) -> None:
    path = tiny_model("llama", tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModel):
        load_stage(source_of(path), LayerRange(0, 2), torch.float32)


@pytest.mark.parametrize("family", ["spoon", "llama"])
def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path, family: str) -> None:
    path = tiny_model("llama", tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    auto_map = {"AutoConfig": "spoon.SpoonConfig", "AutoModelForCausalLM": "spoon.Spoon"}
    (path / "config.json").write_text(json.dumps(config | {"model_type": family, "auto_map": auto_map}))
    (path / "spoon.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    if family == "llama":  # transformers has this one itself
        load_stage(source_of(path), LayerRange(0, 2), torch.float32)
    else:
        with pytest.raises(UnsupportedModel, match="m: family 'spoon' is code that comes with the model"):
            load_stage(source_of(path), LayerRange(0, 2), torch.float32)
    assert not (tmp_path / "ran").exists()


def test_two_tensors_for_one_parameter_are_refused_by_name(tmp_path: Path) -> None:
    path = tiny_model("llama", tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"norm.weight": tensors["model.norm.weight"] * 2}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"'model.norm.weight' and 'norm.weight' are both its model.norm.weight"):
        load_stage(source_of(path), LayerRange(0, 2), torch.float32)


def test_a_layer_that_no_file_holds_is_named(tmp_path: Path) -> None:
    path = tiny_model("llama", tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.6\."):
        load_stage(source_of(path), LayerRange(6, 7), torch.float32)


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    path = tiny_model("llama", tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    with pytest.raises(CorruptWeights, match=r"\[320, 128\].*\[400, 128\]"):
        load_stage(source_of(path), SPLIT[0], torch.float32)


def test_families_with_parts_that_belong_to_no_stage_are_refused(tmp_path: Path) -> None:
    path = tiny_model("gpt2", tmp_path / "m", n_embd=128, n_layer=6, n_head=4)
    with pytest.raises(UnsupportedModel, match="gpt2"):
        load_stage(source_of(path), SPLIT[0], torch.float32)

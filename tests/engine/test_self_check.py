"""A stage whose layers mix tokens in a way of their own does not load, whatever its precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import tiny_model
from torch import nn

from farflung.core.errors import UnsupportedModel
from farflung.core.model import LayerRange
from farflung.engine.loader import load_stage
from farflung.engine.recipe import learn_recipe
from farflung.engine.safetensors_source import SafetensorsSource

Change = Callable[[torch.Tensor], torch.Tensor]


def load(path: Path, dtype: torch.dtype, place: str, change: Change | None) -> None:
    """A stage of two layers; ``change`` works on what one module of the second makes."""
    stage = load_stage(SafetensorsSource.of_folder(path), LayerRange(1, 3), dtype)
    if change is not None:
        module: nn.Module = stage.layers[1].get_submodule(place)
        module.register_forward_hook(lambda *called: change(called[-1]))
    learn_recipe(stage)


def share_of_the_row_before(share: float) -> Change:
    return lambda made: made + share * torch.cat([torch.zeros_like(made[:, :1]), made[:, :-1]], 1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), layers=4)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("place", ["mlp", "self_attn.k_proj", "self_attn.q_proj", "input_layernorm"])
def test_a_layer_that_lets_rows_into_each_other_beside_attention_is_refused(
    llama: Path, place: str, dtype: torch.dtype, share: float
) -> None:
    with pytest.raises(UnsupportedModel, match="its layer 2 computes something else"):
        load(llama, dtype, place, share_of_the_row_before(share))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_are_not_finite_are_refused(llama: Path, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedModel, match="its layer 2 makes values that are not finite"):
        load(llama, dtype, "mlp", lambda made: made.masked_fill(made == made.max(), torch.nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_a_layer_as_it_is_passes_also_with_experts(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96} if "moe" in family else {}
    load(tiny_model(family, tmp_path, layers=4, **experts), dtype, "mlp", None)

"""Norms in fewer calls: what is no such norm stays, what is gives the same values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from farflung.engine.norms import FusedNorm, fuse_norms


@pytest.mark.parametrize("kind", [Qwen2RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (1, 3, 4)])
def test_a_norm_of_either_kind_is_found_and_gives_what_its_own_class_gives(
    kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    norm = kind(96).bfloat16()
    nn.init.normal_(norm.weight)
    layer = nn.ModuleDict({"norm": norm})
    assert fuse_norms(layer) == 1
    assert isinstance(layer["norm"], FusedNorm)
    for size in (1e-3, 1.0, 1e3):
        rows = (torch.randn((*shape, 96)) * size).bfloat16()
        with torch.inference_mode():
            torch.testing.assert_close(layer["norm"](rows), norm(rows), rtol=2**-6, atol=2**-7)


def test_what_only_looks_like_such_a_norm_is_left_alone() -> None:
    class Centred(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(rows, (32,), self.weight, None, self.eps)

    model = nn.ModuleDict({"centred": Centred(), "layer": nn.LayerNorm(32), "linear": nn.Linear(32, 1)})
    assert fuse_norms(model) == 0

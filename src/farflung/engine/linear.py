"""Faster kernels for ``nn.Linear``, chosen by measuring.

bf16 on a CPU: oneDNN multiplies by a weight laid out in its own blocks about twice as fast at one row (896 -> 4864: 0.40 ->
0.16 ms, 896 -> 151936: 33 -> 16 ms on a Zen 4 core) and never slower up to 256 rows, with bit-identical results.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear as multiply

_TRIAL = (1024, 1024)  # rows x columns of the weight that decides
_TRIES = 7


class PackedLinear(nn.Module):  # type: ignore[misc]
    """A linear map whose weight only oneDNN can read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = _pack(linear.weight)
        self._bias = linear.bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._multiply(rows, self._weight, self._bias, "none", [], "")
        return result


def pack_linears(model: nn.Module) -> int:
    """Replaces every ``nn.Linear`` with bf16 weights on the CPU by a packed one, where that is faster here; returns how many.

    One after another, so that memory grows by one weight at most - and by the head, where it is tied to an embedding that is
    held too: the embedding is read by rows, which a packed weight does not offer.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype == torch.bfloat16
    ]
    if not found or not packing_is_faster():
        return 0
    count = len(found)
    while found:  # popping lets each plain weight go before the next is packed
        parent, name, child = found.pop()
        setattr(parent, name, PackedLinear(child))
        del child
    return count


def packing_is_faster() -> bool:
    """Whether one row times a packed bf16 weight takes less than times a plain one, on this machine with this many threads."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    with torch.inference_mode():
        linear = nn.Linear(_TRIAL[1], _TRIAL[0], bias=False, dtype=torch.bfloat16)
        packed, row = PackedLinear(linear), torch.ones((1, _TRIAL[1]), dtype=torch.bfloat16)
        return _least_s(lambda: packed(row)) < _least_s(lambda: multiply(row, linear.weight))


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.detach(), 1
    )  # the row count does not change the layout
    return packed


def _least_s(call: Callable[[], torch.Tensor]) -> float:
    taken = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)

"""The tensors behind the KV pool: one K and one V per layer, allocated once, cells shared out by ``kv_pool``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KvShape:
    """Of one layer: heads and widths of a key and a value. Widths may differ, and layers among each other."""

    heads: int
    key_width: int
    value_width: int


class KvTensors:
    """[1, heads, cells, width] by layer, the shape that attention takes.

    Finite throughout: a masked cell still meets a weight of 0, and 0 x NaN would spoil the sum. So they are zeroed, not just
    allocated, and cleared after a session whose rows were perhaps not finite.
    """

    def __init__(self, shapes: Mapping[int, KvShape], tokens: int, dtype: torch.dtype) -> None:
        """``shapes`` by the layer's own index; ``tokens``: cells per layer."""
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        for layer, shape in shapes.items():
            self.keys[layer] = torch.zeros((1, shape.heads, tokens, shape.key_width), dtype=dtype)
            self.values[layer] = torch.zeros((1, shape.heads, tokens, shape.value_width), dtype=dtype)

    def clear(self, start: int, count: int) -> None:
        """Zeroes cells of all layers."""
        for layer in self.keys:
            self.keys[layer][:, :, start : start + count].zero_()
            self.values[layer][:, :, start : start + count].zero_()

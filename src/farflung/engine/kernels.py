"""Ways to multiply by a weight: each takes rows [..., inputs] to [..., outputs] and holds the weight as it needs it.

Measured (Zen 4, one thread of a busy machine, 896 -> 9728, us for 1 / 8 / 32 rows of bf16): plain 3140 / 3720 / 7810, packed
1925 / 1816 / 5180, int8 1165 / 1229 / 3170, int4 590 / 3200 / 10400. So int4 wins for a row or two, int8 from a few rows on;
where that changes is measured (``kernel_plan``), machine by machine.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import linear as multiply

from farflung.engine.quantise import GROUP, Int4Weight, Rotation, quantise_int4, quantise_int8

_ZERO = 128  # the code of 0 in rows: uint8 is what VNNI multiplies by int8


class Kernel(Protocol):
    """Multiplies by one weight.

    Attributes:
        nbytes: held.
    """

    nbytes: int

    def __call__(self, rows: torch.Tensor) -> torch.Tensor: ...


class Plain:
    """The weight as it is."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self.nbytes = weight.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return multiply(rows, self._weight, self._bias)


class Packed:
    """bf16, in oneDNN's own blocks: twice as fast as plain at one row, never slower up to 256, with identical results."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        # The row count given here does not change the layout.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), 1)
        self._bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self.nbytes = 2 * weight.numel()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._multiply(rows, self._weight, self._bias, "none", [], "")
        return out


class Int8:
    """int8 weights and rows: every row is rotated and then rounded to 255 steps of its own when it comes."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        outputs, inputs = weight.shape
        self._rotation = Rotation(inputs)
        quantised = quantise_int8(weight, self._rotation)
        self._weight = torch.ops.onednn.qlinear_prepack(quantised.codes, None)
        self._scales, self._zeros = quantised.scales, torch.zeros(outputs, dtype=torch.int32)
        self._bias = None if bias is None else bias.float()
        self._outputs = outputs
        self._multiply = torch.ops.onednn.qlinear_pointwise.default
        self.nbytes = quantised.codes.nbytes + quantised.scales.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        values = self._rotation(rows.reshape(-1, rows.shape[-1]).float())
        if len(values) == 1:
            scale = max(float(values.abs().amax()), 1e-8) / 127
            codes = values.mul_(1 / scale).add_(_ZERO + 0.5).to(torch.uint8)  # cut off after half a step more: rounded
            out = self._call(codes, scale, self._bias, rows.dtype)
        else:
            scales = values.abs().amax(1, keepdim=True).clamp_min_(1e-8).div_(127)
            codes = values.div_(scales).add_(_ZERO + 0.5).to(torch.uint8)
            product = self._call(codes, 1.0, None, torch.float32).mul_(scales)
            out = (product if self._bias is None else product.add_(self._bias)).to(rows.dtype)
        return out.view(*rows.shape[:-1], self._outputs)

    def _call(self, codes: torch.Tensor, scale: float, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        out: torch.Tensor = self._multiply(
            codes, scale, _ZERO, self._weight, self._scales, self._zeros, bias, 1.0, 0, dtype, "none", [], ""
        )
        return out


class Int8Weights:
    """int8 weights, rows as they come: for processors whose int8 products overflow or are slow."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        quantised = quantise_int8(weight)
        self._codes, self._scales = quantised.codes, quantised.scales.bfloat16()
        self._bias = bias
        self.nbytes = quantised.codes.nbytes + self._scales.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        out: torch.Tensor = torch._weight_int8pack_mm(flat, self._codes, self._scales)
        if self._bias is not None:
            out = out.add_(self._bias)
        return out.view(*rows.shape[:-1], len(self._codes))


class Int4:
    """int4 weights, rows as they come."""

    def __init__(self, weight: Int4Weight, bias: torch.Tensor | None) -> None:
        self._outputs = len(weight.codes)
        self._weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
        self._lines = torch.stack([weight.scales, weight.zeros], -1).transpose(0, 1).contiguous()
        self._bias = bias
        self._multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        self.nbytes = self._weight.nbytes + self._lines.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._multiply(rows.reshape(-1, rows.shape[-1]), self._weight, GROUP, self._lines)
        if self._bias is not None:
            out = out.add_(self._bias)
        return out.view(*rows.shape[:-1], self._outputs)


class Ladder:
    """One kernel for few rows, another for many."""

    def __init__(self, few: Kernel, many: Kernel, few_rows: int) -> None:
        """``few`` serves up to ``few_rows``."""
        self._few, self._many, self._few_rows = few, many, few_rows
        self.nbytes = few.nbytes + many.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._few(rows) if rows.numel() <= self._few_rows * rows.shape[-1] else self._many(rows)


Int8Maker = type[Int8] | type[Int8Weights]


def int4_of(weight: torch.Tensor, bias: torch.Tensor | None, many: Int8Maker | None, few_rows: int) -> Kernel:
    """A weight of floats as int4. More than ``few_rows`` rows go by ``many`` where given, which is made of the *same* int4
    values: what one row and many rows give differs by their rounding to int8 alone."""
    quantised = quantise_int4(weight)
    few = Int4(quantised, bias)
    return few if many is None else Ladder(few, many(quantised.values(), bias), few_rows)

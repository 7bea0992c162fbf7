"""Weights in fewer bits: int8 with a scale per output, int4 with a scale and a zero per 32 inputs.

Both are rounded to the nearest code. For int4 the line through a group's values is fitted twice: from its least to its greatest
value, then by least squares to the codes that gave, which takes a tenth off the error. Work goes in pieces that stay in the
cache: beside the result it takes a few megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

GROUP = 32
"""Inputs that share a scale and a zero in int4."""
INT4_BYTES = 0.5 + 4 / GROUP
"""Bytes of a weight in int4, its share of scale and zero counted in."""

_PIECE = 2**18  # values at a time: 1 MiB of fp32
_LEAST = 1e-12  # a scale; of weights that are all alike


class Int8Weight(NamedTuple):
    """``codes * scales``: int8 [outputs, inputs] and fp32 [outputs]."""

    codes: torch.Tensor
    scales: torch.Tensor

    def values(self) -> torch.Tensor:
        """fp32 [outputs, inputs]."""
        return self.codes.float() * self.scales[:, None]


class Int4Weight(NamedTuple):
    """``(codes - 8) * scales + zeros``: uint8 [outputs, inputs] of 0 to 15, bf16 [outputs, inputs / GROUP]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def values(self) -> torch.Tensor:
        """fp32 [outputs, inputs]."""
        grouped = (self.codes.float() - 8).unflatten(1, (-1, GROUP))
        return grouped.mul_(self.scales.float()[:, :, None]).add_(self.zeros.float()[:, :, None]).flatten(1)


def quantise_int8(weight: torch.Tensor) -> Int8Weight:
    """Of a weight [outputs, inputs] of any float type."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    for rows in _pieces(weight):
        values = weight[rows].float()
        scale = values.abs().amax(1).div_(127).clamp_min_(_LEAST)
        codes[rows] = values.div_(scale[:, None]).round_()
        scales[rows] = scale
    return Int8Weight(codes, scales)


def quantise_int4(weight: torch.Tensor) -> Int4Weight:
    """Of a weight [outputs, inputs] of any float type; ``inputs`` is a multiple of ``GROUP``."""
    outputs, inputs = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty((outputs, inputs // GROUP), dtype=torch.bfloat16)
    zeros = torch.empty_like(scales)
    for rows in _pieces(weight):
        values = weight[rows].float().unflatten(1, (-1, GROUP))
        low, high = values.aminmax(dim=2, keepdim=True)
        scale = ((high - low) / 15).clamp_min_(_LEAST)
        found = values.sub(low).div_(scale).round_()
        scale, low = _fitted(values, found, scale, low)
        scale = scale.bfloat16()
        zero = low.add(scale.float(), alpha=8).bfloat16()  # of code 8
        found = values.sub(zero.float()).div_(scale.float()).round_().add_(8).clamp_(0, 15)
        codes[rows] = found.flatten(1).to(torch.uint8)
        scales[rows], zeros[rows] = scale[:, :, 0], zero[:, :, 0]
    return Int4Weight(codes, scales, zeros)


def _fitted(
    values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and value of code 0 that fit ``values`` best, given their codes; as they were where codes are all alike."""
    mean_code, mean = codes.mean(2, keepdim=True), values.mean(2, keepdim=True)
    spread = codes.square().mean(2, keepdim=True).sub_(mean_code.square())
    together = (codes * values).mean(2, keepdim=True).sub_(mean_code * mean)
    usable = (spread > 1e-3) & (together > 0)
    fitted = torch.where(usable, together / spread.clamp_min(1e-3), scale)
    return fitted, torch.where(usable, mean - fitted * mean_code, low)


def _pieces(weight: torch.Tensor) -> Iterator[slice]:
    step = max(1, _PIECE // weight.shape[1])
    for start in range(0, len(weight), step):
        yield slice(start, start + step)

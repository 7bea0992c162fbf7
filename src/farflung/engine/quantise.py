"""Weights in fewer bits: int8 with a scale per output, int4 with a scale and a zero per 32 inputs.

Both are rounded to the nearest code. For int4 several lines through a group's values are tried, fitted by least squares to the
codes they give: perplexity of Qwen2.5-Coder-0.5B rises by 3%, where a line from the least to the greatest value, fitted once,
costs 5 to 6%. Work goes in pieces that stay in the cache: beside the result it takes a few megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import NamedTuple

import torch

GROUP = 32
"""Inputs that share a scale and a zero in int4."""
INT4_BYTES = 0.5 + 4 / GROUP
"""Bytes of a weight in int4, its share of scale and zero counted in."""

_PIECE = 2**18  # values at a time: 1 MiB of fp32
_SMALL_PIECE = 2**16  # short steps: waking threads for longer ones takes ten times as long as the work where cores are busy
_SPANS = (1.0, 0.9, 0.8)  # parts of the way from the least to the greatest value, of the lines that are tried
_FITS = 2
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


class Rotation:
    """Hadamard's orthogonal matrix on blocks of inputs, which spreads a large value over its block.

    Rows and weight rotated alike give the same product, but rows whose few large values would take most of the steps of int8
    lose far less: perplexity of Qwen2.5-Coder-0.5B in int8 rises by 1.2% without and not at all with it (as QuaRot does,
    arXiv 2404.00456, there for whole rows and folded into the weights before).
    """

    def __init__(self, inputs: int) -> None:
        """Blocks of 128 where these divide ``inputs``, else of the greatest power of two that does."""
        self._block = gcd(inputs, 128)
        matrix = torch.ones(1, 1)
        while len(matrix) < self._block:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        self._matrix = matrix / self._block**0.5

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """fp32 [n, inputs], rotated."""
        return (values.view(-1, self._block) @ self._matrix).view(values.shape)


def quantise_int8(weight: torch.Tensor, rotation: Rotation | None = None) -> Int8Weight:
    """Of a weight [outputs, inputs] of any float type; rotated first, where ``rotation`` is given."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    for rows in _pieces(weight, _PIECE):
        values = weight[rows].float()
        if rotation is not None:
            values = rotation(values)
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
    for rows in _pieces(weight, _SMALL_PIECE):
        values = weight[rows].float().view(-1, GROUP).T.contiguous()  # [GROUP, groups]: sums along it are five times faster
        scale, zero = _best_line(values)
        codes[rows] = _codes(values, scale, zero).T.reshape(-1, inputs).to(torch.uint8)
        scales[rows], zeros[rows] = scale.view(-1, inputs // GROUP), zero.view(-1, inputs // GROUP)
    return Int4Weight(codes, scales, zeros)


def _best_line(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of values [GROUP, groups]: scale and value of code 8 of each group, as bf16 has them."""
    least, most = values.amin(0), values.amax(0)
    middle, span = (least + most) / 2, most - least
    mean = values.mean(0)
    best: list[torch.Tensor] = []
    for part in _SPANS:
        scale = (span * (part / 15)).clamp_min_(_LEAST)
        zero = middle + scale / 2
        for _ in range(_FITS):
            scale, zero = _fitted(values, mean, _codes(values, scale, zero).sub_(8), scale, zero)
        scale, zero = scale.bfloat16().float(), zero.bfloat16().float()
        off = _codes(values, scale, zero).sub_(8).mul_(scale).add_(zero).sub_(values).square_().sum(0)
        found = [off, scale, zero]
        best = found if not best else [torch.where(off < best[0], new, old) for new, old in zip(found, best, strict=True)]
    return best[1], best[2]


def _codes(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """0 to 15."""
    return values.sub(zero).div_(scale).round_().add_(8).clamp_(0, 15)


def _fitted(
    values: torch.Tensor, mean: torch.Tensor, steps: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and value at step 0 that fit ``values`` best, given their steps; as they were where steps are all alike."""
    mean_step = steps.mean(0)
    together = (steps * values).mean(0).sub_(mean_step * mean)
    spread = steps.square_().mean(0).sub_(mean_step.square())
    usable = (spread > 1e-3) & (together > 0)
    fitted = torch.where(usable, together / spread.clamp_min(1e-3), scale)
    return fitted, torch.where(usable, mean - fitted * mean_step, zero)


def _pieces(weight: torch.Tensor, values: int) -> Iterator[slice]:
    step = max(1, values // weight.shape[1])
    for start in range(0, len(weight), step):
        yield slice(start, start + step)

"""Which kernels serve a stage's linear maps, found by measuring on this machine with this many threads.

A table would be wrong: oneDNN's int8 is 15 times slower than plain on one processor and twice as fast on the next, and on some
its sums overflow. So every candidate is first checked against plain arithmetic and then timed, in turn with the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from farflung.engine.kernels import Int4, Int8, Int8Maker, Int8Weights, Kernel, Packed, Plain, int4_of
from farflung.engine.quantise import GROUP, INT4_BYTES, quantise_int4

Quantised = Literal["int8", "int4"]
"""Weights narrower than activations, which are bf16 then."""

BF16_BYTES, INT8_BYTES = 2.0, 1.0

SMALL = 2**16
"""A weight of fewer values stays plain: oneDNN takes 20 us to begin with, where plain is done after 3."""
NARROW = 256
"""A map to fewer outputs is not quantised: it is cheap, and perhaps a router, which a little noise sends elsewhere."""

_TRIAL = (1024, 1024)  # outputs and inputs of the weights that decide
_COLD = 6  # of them, multiplied in turn
_TRIES = 7
_FEW_ROWS = (1, 2, 4, 8, 16, 32)  # where int4 may hand over to int8
_MANY_ROWS = 16
_WRONG = 0.03  # relative error that rounding to int8 does not explain (0.9% measured)


@dataclass(frozen=True)
class KernelPlan:
    """What becomes of a stage's ``nn.Linear``.

    Attributes:
        packed: large bf16 weights go to oneDNN's layout.
        quantised: large weights become int8 or int4; None: they stay as they are.
        int8: the kernel of int8 weights.
        int4_rows: up to so many rows go by int4; more go by a second, int8 copy of the same values. None: all rows go by int4.
    """

    packed: bool = False
    quantised: Quantised | None = None
    int8: Int8Maker = Int8Weights
    int4_rows: int | None = None

    @property
    def bytes_per_weight(self) -> float:
        """Of a large weight."""
        if self.quantised is None:
            return BF16_BYTES
        if self.quantised == "int8":
            return INT8_BYTES
        return INT4_BYTES + (0.0 if self.int4_rows is None else INT8_BYTES)

    def kernel(self, weight: torch.Tensor, bias: torch.Tensor | None, *, is_head: bool = False) -> Kernel:
        """For one weight [outputs, inputs]. A head that would be int4 is int8: it decides between near-equal logits."""
        outputs, inputs = weight.shape
        if weight.numel() < SMALL or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
            return Plain(weight, bias)
        if self.quantised is not None and outputs >= NARROW:
            if self.quantised == "int4" and not is_head and inputs % GROUP == 0 and outputs % 16 == 0:
                many = None if self.int4_rows is None else self.int8
                return int4_of(weight, bias, many, self.int4_rows or 0)
            return self.int8(weight, bias)
        return Packed(weight, bias) if self.packed else Plain(weight, bias)


def is_narrowed(module: nn.Module) -> bool:
    """Whether a plan with ``quantised`` would narrow the module's weight."""
    return type(module) is nn.Linear and module.weight.numel() >= SMALL and module.out_features >= NARROW


def kernel_plan(quantised: Quantised | None, *, weights: int = 0, budget: int | None = None) -> KernelPlan:
    """Measures for a fraction of a second.

    Args:
        quantised: None for bf16 weights.
        weights: of the stage's linear maps, in all.
        budget: bytes they may take; None: no bound. Where int4 weights leave room in it, they get their int8 copy.
    """
    with torch.inference_mode():
        packed = _packing_is_faster()
        if quantised is None:
            return KernelPlan(packed=packed)
        int8 = _int8_maker()
        has_room = budget is None or weights * (INT4_BYTES + INT8_BYTES) <= budget
        rows = _int4_rows(int8) if quantised == "int4" and has_room else None
        return KernelPlan(packed, quantised, int8, rows)


def first_is_faster(first: Callable[[], object], second: Callable[[], object]) -> bool:
    """By the least of several tries, taken in turn: a moment that something else disturbs falls on both."""
    least = [float("inf"), float("inf")]
    for _ in range(_TRIES):
        for index, call in enumerate((first, second)):
            start = time.perf_counter()
            call()
            least[index] = min(least[index], time.perf_counter() - start)
    return least[0] < least[1]


def _packing_is_faster() -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    weight = _trial_weight().bfloat16()
    row = torch.ones((1, _TRIAL[1]), dtype=torch.bfloat16)
    return first_is_faster(partial(Packed(weight, None), row), partial(Plain(weight, None), row))


def _int8_maker() -> Int8Maker:
    """The faster of the right ones, at few rows and many."""
    weight = _trial_weight()
    plain = Int8Weights(weight, None)
    if not torch.backends.mkldnn.is_available():
        return Int8Weights
    fast = Int8(weight, None)
    rows = torch.linspace(-1, 1, _MANY_ROWS * _TRIAL[1]).view(_MANY_ROWS, -1).bfloat16()
    extreme = torch.where(rows > 0, 1.0, -1.0).bfloat16()  # the greatest sums there are
    expected = weight.T
    for given in (rows, extreme, extreme[:1]):
        right = given.float() @ expected
        if float((fast(given).float() - right).norm()) > _WRONG * float(right.norm()):
            return Int8Weights
    return Int8 if first_is_faster(partial(_each, [fast], rows), partial(_each, [plain], rows)) else Int8Weights


def _int4_rows(int8: Int8Maker) -> int | None:
    """The most rows that int4 multiplies faster than int8; None where it always does."""
    weight = _trial_weight()
    few = [Int4(quantise_int4(weight), None) for _ in range(_COLD)]
    many = [int8(weight, None) for _ in range(_COLD)]
    best = 0
    for count in _FEW_ROWS:
        rows = torch.ones((count, _TRIAL[1]), dtype=torch.bfloat16)
        if not first_is_faster(partial(_each, few, rows), partial(_each, many, rows)):
            return best
        best = count
    return None


def _each(kernels: Sequence[Kernel], rows: torch.Tensor) -> None:
    for kernel in kernels:
        kernel(rows)


def _trial_weight() -> torch.Tensor:
    """fp32, different in every row and column, the same in every run."""
    return torch.randn(_TRIAL, generator=torch.Generator().manual_seed(0))

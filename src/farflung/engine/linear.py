"""Faster kernels for ``nn.Linear``, chosen by measuring.

bf16 on a CPU: oneDNN multiplies by a weight laid out in its own blocks about twice as fast at one row (896 -> 4864: 0.40 ->
0.16 ms, 896 -> 151936: 33 -> 16 ms on a Zen 4 core) and never slower up to 256 rows, with bit-identical results.

fp32 on a CPU: one row is MKL's ``sgemv``, which reads the weight with one thread at a third of the memory's rate. The same
weight as a batch of row blocks goes through ``bmm``, without a copy: 640 -> 262144 takes 21 instead of 64 ms with two threads,
28 with one. Sums are taken in another order, so results differ in the last bits, as they do between row counts anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import linear as multiply

_TRIAL = (1024, 1024)  # rows x columns of the weight that decides
_TRIES = 7
_MAX_BLOCKS = 16
_BLOCK_OUTPUTS = 64  # a smaller block costs more to hand out than to multiply
_MIN_BLOCKED = 2**16  # values of a weight; what lies in a core's cache gains nothing
_BLOCKED_ROWS = (1, 2, 4)  # tried in turn; with 8 rows the head still gains, but layers lose
_COLD_BYTES = 2**26  # of weights multiplied in turn: more than the caches hold, as in a real step


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


class BlockedLinear(nn.Module):  # type: ignore[misc]
    """A linear map that multiplies few rows by blocks of its weight. The weight is the given one, not a copy."""

    def __init__(self, linear: nn.Linear, max_rows: int) -> None:
        """``max_rows``: up to so many rows go block by block."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._max_rows = max_rows
        self._blocks = _in_blocks(linear.weight)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        count = rows.numel() // self.in_features
        if not 0 < count <= self._max_rows:
            return multiply(rows, self.weight, self.bias)
        result = _multiply_blocks(rows.reshape(count, self.in_features), self._blocks)
        if self.bias is not None:
            result = result + self.bias
        return result.reshape(*rows.shape[:-1], self.out_features)


def block_linears(model: nn.Module) -> int:
    """Replaces every ``nn.Linear`` with a large fp32 weight on the CPU by a blocked one, where that is faster here; returns how
    many. Measured on the model's own weights, shape by shape."""
    by_shape: dict[tuple[int, int], list[tuple[nn.Module, str, nn.Linear]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and _can_block(child.weight):
                by_shape.setdefault((child.out_features, child.in_features), []).append((parent, name, child))
    count = 0
    for found in by_shape.values():
        max_rows = _blocked_rows([child.weight for _, _, child in found])
        for parent, name, child in found if max_rows else ():
            setattr(parent, name, BlockedLinear(child, max_rows))
            count += 1
    return count


def _can_block(weight: torch.Tensor) -> bool:
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and bool(weight.is_contiguous())
    return is_plain and weight.numel() >= _MIN_BLOCKED and weight.shape[0] % 2 == 0


def _in_blocks(weight: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs] as a view [blocks, outputs of a block, inputs]."""
    outputs, inputs = weight.shape
    blocks = _MAX_BLOCKS
    while blocks > 2 and (outputs % blocks or outputs // blocks < _BLOCK_OUTPUTS):
        blocks //= 2
    return weight.detach().view(blocks, outputs // blocks, inputs)


def _multiply_blocks(rows: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """[n, inputs] to [n, outputs]."""
    columns = rows.T.expand(blocks.shape[0], -1, -1)
    return torch.bmm(blocks, columns).view(-1, len(rows)).T


def _blocked_rows(weights: list[torch.Tensor]) -> int:
    """Up to how many rows blocks are faster for weights of this shape, on this machine with this many threads; 0: never."""
    inputs = weights[0].shape[1]
    sample: list[torch.Tensor] = []
    for weight in weights:
        room = (_COLD_BYTES - sum(kept.nbytes for kept in sample)) // (4 * inputs * _MAX_BLOCKS) * _MAX_BLOCKS
        if room < min(_MAX_BLOCKS * _BLOCK_OUTPUTS, len(weight)):
            break
        sample.append(weight.detach()[:room])
    blocks = [_in_blocks(weight) for weight in sample]
    best = 0
    with torch.inference_mode():
        for count in _BLOCKED_ROWS:
            rows = torch.ones((count, inputs))
            if not _first_is_faster(
                partial(_each, partial(_multiply_blocks, rows), blocks), partial(_each, partial(multiply, rows), sample)
            ):
                break
            best = count
    return best


def packing_is_faster() -> bool:
    """Whether one row times a packed bf16 weight takes less than times a plain one, on this machine with this many threads."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    with torch.inference_mode():
        linear = nn.Linear(_TRIAL[1], _TRIAL[0], bias=False, dtype=torch.bfloat16)
        packed, row = PackedLinear(linear), torch.ones((1, _TRIAL[1]), dtype=torch.bfloat16)
        return _first_is_faster(lambda: packed(row), partial(multiply, row, linear.weight))


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.detach(), 1
    )  # the row count does not change the layout
    return packed


def _each(call: Callable[[torch.Tensor], torch.Tensor], weights: Iterable[torch.Tensor]) -> None:
    for weight in weights:
        call(weight)


def _first_is_faster(first: Callable[[], object], second: Callable[[], object]) -> bool:
    """By the least of several tries, taken in turn: a moment that something else disturbs falls on both."""
    least = [float("inf"), float("inf")]
    for _ in range(_TRIES):
        for index, call in enumerate((first, second)):
            start = time.perf_counter()
            call()
            least[index] = min(least[index], time.perf_counter() - start)
    return least[0] < least[1]

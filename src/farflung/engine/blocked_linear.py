"""fp32 on a CPU: few rows times a large weight, block by block of its outputs.

One row is MKL's ``sgemv``, which reads the weight with one thread at a third of the memory's rate. The same weight as a batch
of row blocks goes through ``bmm``, without a copy: 640 -> 262144 takes 21 instead of 64 ms with two threads, 28 with one. Sums
are taken in another order, so results differ in the last bits, as they do between row counts anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import linear as multiply

from farflung.engine.kernel_plan import first_is_faster

_MAX_BLOCKS = 16
_BLOCK_OUTPUTS = 64  # a smaller block costs more to hand out than to multiply
_MIN_BLOCKED = 2**16  # values of a weight; what lies in a core's cache gains nothing
_BLOCKED_ROWS = (1, 2, 4)  # tried in turn; with 8 rows the head still gains, but layers lose
_COLD_BYTES = 2**26  # of weights multiplied in turn: more than the caches hold, as in a real step


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
            if not first_is_faster(
                partial(_each, partial(_multiply_blocks, rows), blocks), partial(_each, partial(multiply, rows), sample)
            ):
                break
            best = count
    return best


def _each(call: Callable[[torch.Tensor], torch.Tensor], weights: Iterable[torch.Tensor]) -> None:
    for weight in weights:
        call(weight)

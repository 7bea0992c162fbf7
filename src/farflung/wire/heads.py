"""What the quantised codecs have in front of the codes of a row: numbers that scale them, and the outliers kept apart.

A decoder takes only a head that an encoder writes, so that no product overflows and no position is written twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from farflung.core.errors import CodecError
from farflung.wire.floats import Bits16, Bytes, widen


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Where things lie in the head of a coded row, in words of 16 bits.

    Attributes:
        head_bytes: of the head.
        factors: bfloat16 numbers that scale codes.
        positions, outliers: of the values kept apart.
        mask, most: a head is one that an encoder writes only if ``head & mask <= most`` everywhere.
    """

    head_bytes: int
    factors: slice
    positions: slice
    outliers: slice
    mask: Bits16
    most: Bits16


def head_of(raw: Bytes, row: HeadLayout) -> Bits16:
    """[n, words] of coded rows [n, bytes]; a copy."""
    return raw[:, : row.head_bytes].copy().view(np.uint16)


def is_written(head: Bits16, row: HeadLayout) -> bool:
    """Whether all numbers are in range and the positions ascend, so that none comes twice."""
    positions = head[:, row.positions]
    out_of_range = np.count_nonzero((head & row.mask) > row.most)
    out_of_order = np.count_nonzero(positions[:, 1:] <= positions[:, :-1])
    return not (out_of_range or out_of_order)


def refuse_heads(raw: Bytes, row: HeadLayout, width: int, name: str) -> None:
    """Raises CodecError naming the first row of ``raw`` whose head is none that an encoder of codec ``name`` writes."""
    heads = head_of(raw, row)
    if is_written(heads, row):
        return
    for index in range(len(heads)):
        head = heads[index : index + 1]
        if not is_written(head, row):
            wide = widen(head)[0]
            factors = wide[row.factors]
            raise CodecError(
                f"row {index} is no {name} row of width {width}: scaled by {factors.min()} to {factors.max()}, "
                f"outliers {wide[row.outliers].tolist()} at {head[0, row.positions].tolist()}"
            )

"""Rows as 8-bit integers: about one byte per value, with the few values that would spoil it kept apart.

Per row the 4 values of largest magnitude (of equal ones the first) are kept as bfloat16, "exact" in that format, and count as
zero from there on: the row of a first token has values a thousand times the rest, and one of them would take the precision
of everything that shares its scale. Each block of 128 values has a bfloat16 scale; a value x becomes q = x / scale, rounded
to nearest, ties to even.

The scale is amax / 127 rounded *up* to bfloat16, so that |q| <= 127 without clamping and the error is at most half a scale.
All of it is float32 arithmetic of single, correctly rounded operations, so every implementation gives the same bytes.

A row of width w with b = ceil(w / 128) blocks and k = min(4, w) outliers, little endian, is

    uint16 [b]   scales, bits of bfloat16
    uint16 [k]   positions of the outliers, ascending
    uint16 [k]   their values, bits of bfloat16
    int8   [w]   q, zero where there is an outlier

4,176 bytes at width 4,096. Magnitudes above 2^127 are refused, so that no product q x scale overflows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.core.errors import CodecError
from farflung.wire.floats import Bits16, Bytes, Float32, chunk_rows, refuse_values, round_to_bf16, widen

BLOCK = 128
OUTLIERS = 4
LIMIT = 2.0**127
MAX_SCALE_BITS = 0x7B82
"""Bits of the scale of a block whose amax is ``LIMIT``; a greater one, or a negative one, has no encoder written."""
MAX_OUTLIER_BITS = 0x7F00
"""Bits of ``LIMIT``."""

SMALLEST_SCALE = np.float32(2.0**-133)
"""The least positive bfloat16. Divides blocks whose scale is zero: their values are far smaller and become zero."""

_CODES_PER_AMAX = np.float32(127)
_ROUND_UP = np.uint32(0xFFFF)
_HALF_WORD = np.uint32(16)
_MAGNITUDE16 = np.uint16(0x7FFF)


def blocks_of(width: int) -> int:
    return -(-width // BLOCK)


def outliers_of(width: int) -> int:
    return min(OUTLIERS, width)


def head_bytes(width: int) -> int:
    """Bytes of a row before its codes."""
    return 2 * blocks_of(width) + 4 * outliers_of(width)


def row_bytes(width: int) -> int:
    return head_bytes(width) + width


def encode(rows: Float32) -> bytes:
    n, width = rows.shape
    out: Bytes = np.empty((n, row_bytes(width)), np.uint8)
    step = chunk_rows(width)
    for start in range(0, n, step):
        if not _encode_into(rows[start : start + step], out[start : start + step]):
            refuse_values(rows, LIMIT, "int8")
    return out.tobytes()


def _encode_into(rows: Float32, out: Bytes) -> bool:
    """Codes a few rows; False where one of them holds a value that int8 does not carry."""
    n, width = rows.shape
    blocks, kept = blocks_of(width), outliers_of(width)
    if width == blocks * BLOCK:
        values = rows.copy()
    else:  # zeros fill the last block; they neither raise its amax nor win a tie, as they come last
        values = np.zeros((n, blocks * BLOCK), np.float32)
        values[:, :width] = rows
    sizes = np.abs(values)
    flat_values, flat_sizes = values.reshape(-1), sizes.reshape(-1)
    row_starts = np.arange(0, values.size, values.shape[1])[:, None]

    where = _take_largest(sizes, flat_sizes, row_starts, kept)
    if where is None:
        return False
    head: Bits16 = np.empty((n, blocks + 2 * kept), np.uint16)
    head[:, blocks : blocks + kept] = where
    where += row_starts
    head[:, blocks + kept :] = round_to_bf16(flat_values[where])
    flat_values[where] = 0.0
    flat_sizes[where] = 0.0

    amax = np.maximum.reduceat(flat_sizes, np.arange(0, sizes.size, BLOCK))
    amax /= _CODES_PER_AMAX
    scales = amax.view(np.uint32)
    scales += _ROUND_UP
    scales >>= _HALF_WORD
    head[:, :blocks] = scales.reshape(n, blocks)
    scales <<= _HALF_WORD
    divisors = np.maximum(scales.view(np.float32), SMALLEST_SCALE)
    blockwise = values.reshape(n * blocks, BLOCK)
    np.divide(blockwise, divisors[:, None], out=blockwise)
    np.rint(values, out=values)

    out[:, : head_bytes(width)] = head.view(np.uint8)
    out[:, head_bytes(width) :].view(np.int8)[...] = values[:, :width]
    return True


def _take_largest(sizes: Float32, flat: Float32, row_starts: NDArray[np.intp], kept: int) -> NDArray[np.intp] | None:
    """Positions [n, kept] of the greatest of each row, ascending, the first of equal ones; None where one is out of range.

    What is taken is overwritten in ``sizes`` by -1, below every magnitude.
    """
    n = len(sizes)
    if n == 1:  # a decode step: plain numbers cost less than arrays of one
        taken = []
        for _ in range(kept):
            position = int(flat.argmax())
            if not flat[position] <= LIMIT:  # a NaN is found as the greatest
                return None
            flat[position] = -1.0
            taken.append(position)
        taken.sort()
        return np.array([taken])
    where = np.empty((n, kept), np.intp)
    for rank in range(kept):
        position = sizes.argmax(axis=1, keepdims=True)
        where[:, rank : rank + 1] = position
        position += row_starts
        if rank == 0 and not (flat[position] <= LIMIT).all():
            return None
        flat[position] = -1.0
    where.sort(axis=1)
    return where


def decode(raw: Bytes, width: int) -> Float32:
    n = len(raw)
    out: Float32 = np.empty((n, width), np.float32)
    step = chunk_rows(width)
    for start in range(0, n, step):
        if not _decode_into(raw[start : start + step], out[start : start + step]):
            _refuse_head(raw, width)
    return out


def _decode_into(raw: Bytes, out: Float32) -> bool:
    """Decodes a few rows; False where the head of one of them is none that an encoder writes."""
    n, width = out.shape
    blocks, kept, start = blocks_of(width), outliers_of(width), head_bytes(width)
    head: Bits16 = raw[:, :start].copy().view(np.uint16)
    scales, where, exact = head[:, :blocks], head[:, blocks : blocks + kept], head[:, blocks + kept :]
    if not _good_heads(scales, where, exact, width):
        return False
    codes = raw[:, start:].view(np.int8)
    steps = widen(scales)
    whole = width // BLOCK
    body = whole * BLOCK
    np.multiply(codes[:, :body].reshape(n, whole, BLOCK), steps[:, :whole, None], out=out[:, :body].reshape(n, whole, BLOCK))
    if whole < blocks:
        np.multiply(codes[:, body:], steps[:, whole:], out=out[:, body:])
    out[np.arange(n)[:, None], where] = widen(exact)
    return True


def _good_heads(scales: Bits16, where: Bits16, exact: Bits16, width: int) -> bool:
    return bool(
        scales.max() <= MAX_SCALE_BITS
        and (exact & _MAGNITUDE16).max() <= MAX_OUTLIER_BITS
        and where.max() < width
        and (where[:, 1:] > where[:, :-1]).all()
    )


def _refuse_head(raw: Bytes, width: int) -> None:
    blocks, kept = blocks_of(width), outliers_of(width)
    head: Bits16 = raw[:, : head_bytes(width)].copy().view(np.uint16)
    for row, (scales, where, exact) in enumerate(
        zip(head[:, :blocks], head[:, blocks : blocks + kept], head[:, blocks + kept :], strict=True)
    ):
        if not _good_heads(scales[None], where[None], exact[None], width):
            raise CodecError(
                f"row {row} is no int8 row of width {width}: scales up to {widen(scales).max()}, "
                f"outliers {widen(exact).tolist()} at {where.tolist()}"
            )

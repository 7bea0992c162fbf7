"""Rows as 8-bit integers: about one byte per value, with the few values that would spoil it kept apart.

Per row the 4 values of largest magnitude (of equal ones the first) are kept as bfloat16, "exact" in that format, and count as
zero from there on: the row of a first token has values a thousand times the rest, and one of them would take the precision
of everything that shares its scale. Each block of 128 values has a bfloat16 scale; a value x becomes q = x / scale, rounded
to nearest, ties to even.

The scale is amax / 127 rounded *up* to bfloat16, so that |q| <= 127 without clamping and the error is at most half a scale
(a block whose amax / 127 is zero in float32, so below 1e-43, becomes zero). All of it is float32 arithmetic of single,
correctly rounded operations, so every implementation gives the same bytes.

A row of width w with b = ceil(w / 128) blocks and k = min(4, w) outliers, little endian, is

    uint16 [b]   scales, bits of bfloat16
    uint16 [k]   positions of the outliers, ascending
    uint16 [k]   their values, bits of bfloat16
    int8   [w]   q, zero where there is an outlier

4,176 bytes at width 4,096. Magnitudes above 2^127 are refused, so that no product q x scale overflows.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from farflung.wire import heads
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


@dataclass(frozen=True, kw_only=True)
class Layout(heads.HeadLayout):
    """Where things lie in a coded row; see ``HeadLayout`` too.

    Attributes:
        blocks: number of scales.
        kept: number of outliers.
    """

    blocks: int
    kept: int


@lru_cache(maxsize=64)
def layout(width: int) -> Layout:
    blocks, kept = -(-width // BLOCK), min(OUTLIERS, width)
    words = blocks + 2 * kept
    return Layout(
        blocks=blocks,
        kept=kept,
        head_bytes=2 * words,
        factors=slice(0, blocks),
        positions=slice(blocks, blocks + kept),
        outliers=slice(blocks + kept, words),
        mask=np.repeat(np.array([0xFFFF, 0xFFFF, 0x7FFF], np.uint16), [blocks, kept, kept]),
        most=np.repeat(np.array([MAX_SCALE_BITS, width - 1, MAX_OUTLIER_BITS], np.uint16), [blocks, kept, kept]),
    )


def row_bytes(width: int) -> int:
    return layout(width).head_bytes + width


def encode(rows: Float32) -> bytes:
    n, width = rows.shape
    step = min(n, chunk_rows(width))
    out: Bytes = np.empty((step, row_bytes(width)), np.uint8)
    room: Float32 = np.empty((2, step, layout(width).blocks * BLOCK), np.float32)
    coded = io.BytesIO()
    for start in range(0, n, step or 1):
        chunk = rows[start : start + step]
        size = len(chunk)
        if not _encode_into(chunk, room[:, :size], out[:size]):
            refuse_values(rows, LIMIT, "int8")
        coded.write(out[:size].data)
    return coded.getvalue()


def _encode_into(rows: Float32, room: Float32, out: Bytes) -> bool:
    """Codes a few rows; False where one of them holds a value that int8 does not carry."""
    n, width = rows.shape
    row = layout(width)
    values, sizes = room
    values[:, :width] = rows
    values[:, width:] = 0.0  # they fill the last block; they neither raise its amax nor win a tie, as they come last
    np.abs(values, out=sizes)
    flat_values, flat_sizes = values.reshape(-1), sizes.reshape(-1)

    where = _take_largest(sizes, flat_sizes, row.kept)
    if where is None:
        return False
    head: Bits16 = np.empty((n, len(row.mask)), np.uint16)
    head[:, row.positions] = where
    if n > 1:
        where += np.arange(0, values.size, values.shape[1])[:, None]
    head[:, row.outliers] = round_to_bf16(flat_values[where])
    flat_values[where] = 0.0
    flat_sizes[where] = 0.0

    amax = np.maximum.reduceat(flat_sizes, np.arange(0, sizes.size, BLOCK))
    amax /= _CODES_PER_AMAX
    scales = amax.view(np.uint32)
    scales += _ROUND_UP
    scales >>= _HALF_WORD
    head[:, row.factors] = scales.reshape(n, row.blocks)
    scales <<= _HALF_WORD
    divisors = np.maximum(scales.view(np.float32), SMALLEST_SCALE)
    blockwise = values.reshape(-1, BLOCK)
    np.divide(blockwise, divisors[:, None], out=blockwise)
    np.rint(values, out=values)

    out[:, : row.head_bytes] = head.view(np.uint8)
    out[:, row.head_bytes :].view(np.int8)[...] = values[:, :width]
    return True


def _take_largest(sizes: Float32, flat: Float32, kept: int) -> NDArray[np.intp] | None:
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
    row_starts = np.arange(0, sizes.size, sizes.shape[1])[:, None]
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
            refuse_heads(raw, width)
    return out


def _decode_into(raw: Bytes, out: Float32) -> bool:
    """Decodes a few rows; False where the head of one of them is none that an encoder writes."""
    n, width = out.shape
    row = layout(width)
    head = heads.head_of(raw, row)
    if not heads.is_written(head, row):
        return False
    wide = widen(head)
    scales = wide[:, row.factors]
    codes = raw[:, row.head_bytes :].view(np.int8)
    whole = width // BLOCK
    body = whole * BLOCK
    np.multiply(codes[:, :body].reshape(n, whole, BLOCK), scales[:, :whole, None], out=out[:, :body].reshape(n, whole, BLOCK))
    if body < width:
        np.multiply(codes[:, body:], scales[:, whole:], out=out[:, body:])
    where = head[:, row.positions].astype(np.intp)
    if n > 1:
        where += np.arange(0, out.size, width)[:, None]
    out.reshape(-1)[where] = wide[:, row.outliers]
    return True


def refuse_heads(raw: Bytes, width: int) -> None:
    """Raises CodecError naming the first row of ``raw`` whose head is none that an encoder writes."""
    heads.refuse_heads(raw, layout(width), width, "int8")

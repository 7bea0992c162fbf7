"""Rows as 4-bit integers, for links that are too slow for int8: 0.58 bytes per value, and it shows in the text.

Measured: KL / greedy agreement with the uncoded model over 1, 3, 7 boundaries, 960 tokens of six texts. Qwen2.5-Coder-0.5B, 570
bytes a row: .0026 / 98.0%, .0084 / 96.6%, .019 / 93.6% (int8 over 3, 926 bytes: .0002 / 99.5%). Gemma-3-270m, 426 bytes: .028 /
91.2%, .26 / 75.3%, .53 / 65.2%: a narrow model with great outliers, for which int4 is no choice. Tried for it, KL over 3 in
Qwen, Gemma and bytes at width 4,096: blocks of 32 with 8 outliers and bfloat16 scales .020, -, 2336; the same with signed
scales .014, .48; 32 with 16 and one-byte scales .011, .33, 2242; 32 with 32 .0081, .20, 2306; 16 with 16 .0076, .23, 2370.

Per row the 16 values of largest magnitude (of equal ones the first) are kept as bfloat16 and count as zero from there on. The
rest is cut into b = ceil(w / 16) blocks; block j has the values at positions j, j + b, j + 2b, ..., because a maximum over
the rows of an array costs a fifth of one along them, and no order of channels is better than another. The block's scale is a
whole multiple c of the row's step S, negative where the value of largest magnitude is positive: that value becomes -8, the
one code without a counterpart, and q = x / (c S) rounded to nearest, ties to even, is at most 8 and cut to 7. So the error is
at most half a scale, or a whole one for a value within a scale of the largest and of the other sign.

    S   = the largest magnitude that is left in the row / 1016, rounded up to bfloat16, at least 2^-133
    |c| = the largest magnitude of the block / 8 S, rounded up, at most 127; 0 for a block of zeros, or where that
          quotient is zero in float32 (below 2^-149): the block becomes zeros

All of it is float32 arithmetic of single, correctly rounded operations (c S and q c S are exact), so every implementation gives
the same bytes. A row of width w with k = min(16, w) outliers, little endian, is

    uint16       S, bits of bfloat16
    uint16 [k]   positions of the outliers, ascending
    uint16 [k]   their values, bits of bfloat16
    int8   [b]   c
    uint8  [8 b] q + 8 at position i in the low half of byte i, at position 8 b + i in the high half; 8 past the end of the row

2,370 bytes at width 4,096. Magnitudes above 2^127 are refused, so that no product overflows.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from farflung.wire import heads
from farflung.wire.floats import Bits16, Bits32, Bytes, Float32, chunk_rows, refuse_values, round_to_bf16, widen

BLOCK = 16
OUTLIERS = 16
LIMIT = 2.0**127
MAX_STEP_BITS = 0x7A02
"""Bits of the step of a row whose largest magnitude is ``LIMIT``; a greater one, or a negative one, has no encoder written."""
MAX_OUTLIER_BITS = 0x7F00
"""Bits of ``LIMIT``."""

STEPS_PER_MAX = np.float32(8 * 127)
_EIGHT, _ONE, _TWO = np.float32(8), np.float32(1), np.float32(2)
_MOST_STEPS = np.float32(127)
_ROUND_UP = np.uint32(0xFFFF)
_HALF_WORD = np.uint32(16)
_LEAST_STEP_BITS = np.uint32(1)
_ONE_TOO_MANY = np.uint8(16)
_HIGH, _LOW, _HALF_BYTE = np.uint8(16), np.uint8(15), np.uint8(4)

_INFINITY = 0x7F800000

Places = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class Layout(heads.HeadLayout):
    """Where things lie in a coded row; see ``HeadLayout`` too.

    Attributes:
        blocks: number of blocks.
        padded: values of all blocks, at least the width.
        kept: number of outliers.
        bytes: of a row.
        scales, codes: bytes of the row.
    """

    blocks: int
    padded: int
    kept: int
    bytes: int
    scales: slice
    codes: slice


@lru_cache(maxsize=64)
def layout(width: int) -> Layout:
    blocks, kept = -(-width // BLOCK), min(OUTLIERS, width)
    head_bytes = 2 + 4 * kept
    codes_at = head_bytes + blocks
    size = codes_at + blocks * BLOCK // 2
    return Layout(
        blocks=blocks,
        padded=blocks * BLOCK,
        kept=kept,
        bytes=size,
        head_bytes=head_bytes,
        factors=slice(0, 1),
        positions=slice(1, 1 + kept),
        outliers=slice(1 + kept, 1 + 2 * kept),
        scales=slice(head_bytes, codes_at),
        codes=slice(codes_at, size),
        mask=np.repeat(np.array([0xFFFF, 0xFFFF, 0x7FFF], np.uint16), [1, kept, kept]),
        most=np.repeat(np.array([MAX_STEP_BITS, width - 1, MAX_OUTLIER_BITS], np.uint16), [1, kept, kept]),
    )


def row_bytes(width: int) -> int:
    return layout(width).bytes


def encode(rows: Float32) -> bytes:
    n, width = rows.shape
    row = layout(width)
    step = min(n, chunk_rows(width))
    out: Bytes = np.empty((step, row.bytes), np.uint8)
    room: Float32 = np.zeros((2, BLOCK * step * row.blocks), np.float32)
    coded = io.BytesIO()
    for start in range(0, n, step or 1):
        chunk = rows[start : start + step]
        size = len(chunk)
        if not _encode_into(chunk, room[:, : size * row.padded].reshape(2, BLOCK, size, row.blocks), out[:size]):
            refuse_values(rows, LIMIT, "int4")
        coded.write(out[:size].data)
    return coded.getvalue()


def _encode_into(rows: Float32, room: Float32, out: Bytes) -> bool:
    """Codes a few rows; False where one of them holds a value that int4 does not carry.

    ``room`` is [2, BLOCK, n, blocks]: what runs over blocks runs over all rows at once, and a maximum per block is one over the
    first axis.
    """
    n, width = rows.shape
    row = layout(width)
    values, sizes = room
    _spread(rows, values)
    np.abs(values, out=sizes)
    most: Float32 = sizes.max(axis=0)
    if not most.max() <= LIMIT:  # a NaN is found as the greatest
        return False
    positions, places = _largest(sizes, most, row.kept)
    head: Bits16 = np.empty((n, len(row.mask)), np.uint16)
    head[:, row.positions] = positions
    flat = values.reshape(-1)
    head[:, row.outliers] = round_to_bf16(flat[places])
    flat[places] = 0.0
    sizes.reshape(-1)[places] = 0.0

    scales: Float32 = sizes.max(axis=0)
    is_positive = values.max(axis=0) == scales
    bits: Bits32 = (scales.max(axis=1) / STEPS_PER_MAX).view(np.uint32)
    bits += _ROUND_UP
    bits >>= _HALF_WORD
    np.maximum(bits, _LEAST_STEP_BITS, out=bits)
    head[:, 0] = bits
    bits <<= _HALF_WORD
    step = bits.view(np.float32)[:, None]
    scales /= step * _EIGHT
    np.ceil(scales, out=scales)
    np.minimum(scales, _MOST_STEPS, out=scales)
    scales *= _ONE - _TWO * is_positive
    out[:, row.scales].view(np.int8)[...] = scales
    scales *= step
    scales[scales == 0.0] = _ONE  # of blocks of zeros
    np.divide(values, scales, out=values)
    np.rint(values, out=values)
    values += _EIGHT

    codes = values.astype(np.uint8)
    codes -= codes == _ONE_TOO_MANY  # this, and a product for a shift, are many times faster on bytes than a minimum
    pairs = codes[BLOCK // 2 :] * _HIGH
    pairs += codes[: BLOCK // 2]
    out[:, : row.head_bytes] = head.view(np.uint8)
    out[:, row.codes].reshape(n, BLOCK // 2, row.blocks)[...] = pairs.transpose(1, 0, 2)
    return True


def _spread(rows: Float32, values: Float32) -> None:
    """Lays rows [n, width] out as ``values`` [BLOCK, n, blocks], with zeros after them: these neither raise a maximum nor win a
    tie, as they come last."""
    n, width = rows.shape
    blocks = values.shape[2]
    whole = width // blocks
    values[:whole] = rows[:, : whole * blocks].reshape(n, whole, blocks).transpose(1, 0, 2)
    if whole < BLOCK:
        rest = width - whole * blocks
        values[whole, :, :rest] = rows[:, whole * blocks :]
        values[whole, :, rest:] = 0.0
        values[whole + 1 :] = 0.0


def _largest(sizes: Float32, most: Float32, kept: int) -> tuple[Places, Places]:
    """The greatest of each row, of equal ones the first: positions [n, kept] in the row, ascending, and where these lie in
    the flattened ``sizes``.

    The ``kept``-th greatest of the blocks' maxima has at least ``kept`` values at or above it, and rarely many more: only these
    are put in order. Of a row with fewer blocks all values are.
    """
    _, n, blocks = sizes.shape
    if blocks >= kept:
        floor = np.partition(most, blocks - kept, axis=1)[:, -kept, None]
        places = np.flatnonzero(sizes >= floor)
    else:
        places = np.arange(sizes.size)
    if n == 1:
        if len(places) > kept:
            places = places[(-sizes.reshape(-1)[places]).argsort(kind="stable")[:kept]]
            places.sort()
        return places[None], places[None]
    layer, rest = np.divmod(places, n * blocks)
    row, column = np.divmod(rest, blocks)
    # One number each, in the order of row, size (the greatest first; bits of floats without sign rise as they do), position.
    keys = ((row << 31) - sizes.reshape(-1).view(np.int32)[places] << 16) + layer * blocks + column
    keys.sort()
    starts = keys.searchsorted((np.arange(n) << 47) - (_INFINITY << 16))
    positions = keys[starts[:, None] + np.arange(kept)] & 0xFFFF
    positions.sort(axis=1)
    layer, column = np.divmod(positions, blocks)
    return positions, layer * (n * blocks) + np.arange(0, n * blocks, blocks)[:, None] + column


def decode(raw: Bytes, width: int) -> Float32:
    n = len(raw)
    row = layout(width)
    out: Float32 = np.empty((n, row.padded), np.float32)
    step = chunk_rows(width)
    for start in range(0, n, step):
        if not _decode_into(raw[start : start + step], width, out[start : start + step]):
            refuse_heads(raw, width)
    return out if width == row.padded else np.ascontiguousarray(out[:, :width])


def _decode_into(raw: Bytes, width: int, out: Float32) -> bool:
    """Decodes a few rows; False where the head of one of them is none that an encoder writes."""
    n = len(raw)
    row = layout(width)
    head = heads.head_of(raw, row)
    if not heads.is_written(head, row):
        return False
    wide = widen(head)
    scales = raw[:, row.scales].view(np.int8) * wide[:, :1]
    codes = raw[:, row.codes]
    half = row.padded // 2
    out[:, :half] = codes & _LOW
    out[:, half:] = codes >> _HALF_BYTE
    out -= _EIGHT
    blockwise = out.reshape(n, BLOCK, row.blocks)
    blockwise *= scales[:, None, :]
    where = head[:, row.positions].astype(np.intp)
    if n > 1:
        where += np.arange(0, out.size, row.padded)[:, None]
    out.reshape(-1)[where] = wide[:, row.outliers]
    return True


def refuse_heads(raw: Bytes, width: int) -> None:
    """Raises CodecError naming the first row of ``raw`` whose head is none that an encoder writes."""
    heads.refuse_heads(raw, layout(width), width, "int4")

"""Rows of float32 and of bfloat16: the two codecs without scales, and the rounding that the third one shares.

bfloat16 is the upper half of a float32 (8 bits of exponent, 7 of mantissa). Values are rounded to nearest, ties to even. A
value that would round to infinity is refused like infinity itself: nothing is saturated, so what a stage receives is what
its predecessor had to within half a unit in the last place.

``rows`` is float32 [n, width] and contiguous; a coded row is its values in order, little endian.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from farflung.core.errors import CodecError

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Bits16 = NDArray[np.uint16]
Bits32 = NDArray[np.uint32]

MAX_FLOAT32 = float(np.finfo(np.float32).max)
MAX_BF16 = float(np.array(0x7F7F7FFF, np.uint32).view(np.float32))
"""The greatest float32 that does not round to a bfloat16 infinity, about 3.396e38."""

_INFINITY16, _MINUS_INFINITY16 = 0x7F80, 0xFF80
_HALF_WORD = np.uint32(16)
_ONE = np.uint32(1)
_BELOW_HALF = np.uint32(0x7FFF)
_CHUNK_VALUES = 64 * 1024


def chunk_rows(width: int) -> int:
    """Rows worked on at a time: several passes over 256 KiB of float32 stay in the cache.

    Room for the passes is made once for all chunks, and what is coded goes straight into the bytes that are returned: blocks
    of that size may come fresh from the kernel each time they are asked for, and then page faults take longer than arithmetic.
    """
    return max(1, _CHUNK_VALUES // width)


def round_to_bf16(values: Float32, room: Bits32 | None = None) -> Bits32:
    """Bits of the nearest bfloat16, ties to even, as 32-bit numbers; in ``room``, of the same shape, if that is given.

    The values must be finite and not round to infinity.
    """
    bits = values.view(np.uint32)
    rounded = np.right_shift(bits, _HALF_WORD, out=room)
    rounded &= _ONE
    rounded += _BELOW_HALF
    rounded += bits
    rounded >>= _HALF_WORD
    return rounded


def widen(bits: Bits16) -> Float32:
    """The float32 values of bfloat16 bits, exactly."""
    wide: Bits32 = bits.astype(np.uint32)
    wide <<= _HALF_WORD
    return wide.view(np.float32)


def within(rows: Float32, limit: float) -> bool:
    """Whether no value is NaN or greater than ``limit`` in magnitude."""
    return not rows.size or bool(rows.max() <= limit and rows.min() >= -limit)  # a NaN wins both and loses the comparison


def refuse_values(rows: Float32, limit: float, name: str) -> None:
    """Raises CodecError naming the first value of ``rows`` that is not a number or greater than ``limit`` in magnitude."""
    bad = np.argwhere(~(np.abs(rows) <= limit))
    if len(bad):
        row, column = (int(index) for index in bad[0])
        raise CodecError(
            f"row {row} holds {rows[row, column]} at position {column}: {name} carries magnitudes up to {limit:.4g}",
            hint="activations overflow from damaged weights or float16 arithmetic; compute in bfloat16 or float32",
        )


def refuse_bits(bits: Bits16) -> None:
    """Raises CodecError where a bfloat16 of ``bits`` [n, width] is infinite or not a number."""
    # As signed numbers the positive ones are the greatest, as unsigned the negative ones; each ends in infinity and NaN.
    if bits.size and (bits.view(np.int16).max() >= _INFINITY16 or bits.max() >= _MINUS_INFINITY16):
        refuse_values(widen(bits), MAX_BF16, "bf16")


def encode_fp32(rows: Float32) -> bytes:
    if not within(rows, MAX_FLOAT32):
        refuse_values(rows, MAX_FLOAT32, "fp32")
    return rows.tobytes()


def decode_fp32(raw: Bytes, width: int) -> Float32:
    rows = raw.reshape(-1).view(np.float32).reshape(-1, width).copy()
    if not within(rows, MAX_FLOAT32):
        refuse_values(rows, MAX_FLOAT32, "fp32")
    return rows


def encode_bf16(rows: Float32) -> bytes:
    n, width = rows.shape
    step = min(n, chunk_rows(width))
    room: Bits32 = np.empty((step, width), np.uint32)
    coded = io.BytesIO()
    for start in range(0, n, step or 1):
        chunk = rows[start : start + step]
        if not within(chunk, MAX_BF16):
            refuse_values(rows, MAX_BF16, "bf16")
        coded.write(round_to_bf16(chunk, room[: len(chunk)]).astype(np.uint16).data)
    return coded.getvalue()


def decode_bf16(raw: Bytes, width: int) -> Float32:
    bits = raw.reshape(-1).view(np.uint16).reshape(-1, width)
    refuse_bits(bits)
    return widen(bits)

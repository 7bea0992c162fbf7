"""Rows of float32 and of bfloat16: the two codecs that keep every value, and the rounding that the third one shares.

bfloat16 is the upper half of a float32 (8 bits of exponent, 7 of mantissa). Values are rounded to nearest, ties to even. A
value that would round to infinity is refused like infinity itself: nothing is saturated, so what a stage receives is what
its predecessor had to within half a unit in the last place.

``rows`` is float32 [n, width] and contiguous; a coded row is its values in order, little endian.
"""

from __future__ import annotations

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

_EXPONENT16 = 0x7F80
_FINITE32 = np.uint32(0x7F7FFFFF)
_MAX_BF16_BITS = np.uint32(0x7F7F7FFF)
_HALF_WORD = np.uint32(16)
_ONE = np.uint32(1)
_BELOW_HALF = np.uint32(0x7FFF)
_MAGNITUDE32 = np.uint32(0x7FFFFFFF)
_CHUNK_VALUES = 64 * 1024


def chunk_rows(width: int) -> int:
    """Rows worked on at a time: several passes over 256 KiB of float32 stay in the cache."""
    return max(1, _CHUNK_VALUES // width)


def round_to_bf16(values: Float32) -> Bits16:
    """Bits of the nearest bfloat16, ties to even. The values must be finite and not round to infinity."""
    bits = values.view(np.uint32)
    carry = bits >> _HALF_WORD
    carry &= _ONE
    carry += _BELOW_HALF
    carry += bits
    carry >>= _HALF_WORD
    return carry.astype(np.uint16)


def widen(bits: Bits16) -> Float32:
    """The float32 values of bfloat16 bits, exactly."""
    wide: Bits32 = bits.astype(np.uint32)
    wide <<= _HALF_WORD
    return wide.view(np.float32)


def refuse_values(rows: Float32, limit: float, name: str) -> None:
    """Raises CodecError naming the first value of ``rows`` that is not a number or greater than ``limit`` in magnitude."""
    bad = np.argwhere(~(np.abs(rows) <= limit))
    if len(bad):
        row, column = (int(index) for index in bad[0])
        raise CodecError(
            f"row {row} holds {rows[row, column]} at position {column}: {name} carries magnitudes up to {limit:.4g}",
            hint="activations overflow from damaged weights or float16 arithmetic; compute in bfloat16 or float32",
        )


def encode_fp32(rows: Float32) -> bytes:
    if rows.size and (rows.view(np.uint32) & _MAGNITUDE32).max() > _FINITE32:
        refuse_values(rows, MAX_FLOAT32, "fp32")
    return rows.tobytes()


def decode_fp32(raw: Bytes, width: int) -> Float32:
    rows = raw.reshape(-1).view(np.float32).reshape(-1, width)
    if rows.size and (rows.view(np.uint32) & _MAGNITUDE32).max() > _FINITE32:
        refuse_values(rows, MAX_FLOAT32, "fp32")
    return rows.copy()


def encode_bf16(rows: Float32) -> bytes:
    out: Bits16 = np.empty(rows.shape, np.uint16)
    step = chunk_rows(rows.shape[1])
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        if (chunk.view(np.uint32) & _MAGNITUDE32).max() > _MAX_BF16_BITS:
            refuse_values(rows, MAX_BF16, "bf16")
        out[start : start + step] = round_to_bf16(chunk)
    return out.tobytes()


def decode_bf16(raw: Bytes, width: int) -> Float32:
    bits = raw.reshape(-1).view(np.uint16).reshape(-1, width)
    refuse_bits(bits)
    return widen(bits)


def refuse_bits(bits: Bits16) -> None:
    """Raises CodecError where a bfloat16 [n, width] is infinite or not a number."""
    if bits.size and (bits & np.uint16(0x7FFF)).max() >= _EXPONENT16:
        refuse_values(widen(bits), MAX_BF16, "bf16")

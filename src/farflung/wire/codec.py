"""The codecs by which activations travel between stages, behind one registry: ``codec("int8").encode(rows)``.

    fp32    4 bytes a value, exact                                    (wire.floats)
    bf16    2 bytes a value, rounded to nearest, ties to even         (wire.floats)
    int8    about 1 byte a value, largest values of a row kept apart  (wire.int8)
    int4    about half a byte a value, for desperate links            (wire.int4)

A coded row has a fixed number of bytes, and rows follow one another, so that a log of rows can be cut anywhere. None of them
carries NaN or infinity, in either direction: one such value would poison whatever it meets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farflung.core.errors import CodecError
from farflung.wire import floats, int4, int8
from farflung.wire.floats import Bytes, Float32
from farflung.wire.frame import Buffer

MAX_WIDTH = 2**16
"""Positions of outliers are 16 bits."""


@dataclass(frozen=True)
class Codec:
    """One way to code rows of activations. Made by this module; ``codec`` finds it by name."""

    name: str
    _row_bytes: Callable[[int], int]
    _encode: Callable[[Float32], bytes]
    _decode: Callable[[Bytes, int], Float32]

    def row_bytes(self, width: int) -> int:
        """Bytes of one coded row of ``width`` values. Raises CodecError unless 1 <= width <= 65536."""
        if not 1 <= width <= MAX_WIDTH:
            raise CodecError(f"{self.name} carries rows of 1 to {MAX_WIDTH} values, not of {width}")
        return self._row_bytes(width)

    def rows_in(self, size: int, width: int) -> int:
        """Number of rows in ``size`` bytes. Raises CodecError where that is not a whole number."""
        row = self.row_bytes(width)
        if size % row:
            raise CodecError(f"{size} bytes are no whole number of {self.name} rows of width {width}: a row has {row} bytes")
        return size // row

    def encode(self, rows: NDArray[np.float32]) -> bytes:
        """Codes ``rows``, float32 [n, width].

        Raises CodecError for another shape or type, or, naming the row, for a value that is not finite or beyond the codec.
        """
        if rows.ndim != 2 or rows.dtype != np.float32:
            raise CodecError(f"{self.name} takes float32 [rows, width], not {rows.dtype} {list(rows.shape)}")
        self.row_bytes(rows.shape[1])
        return self._encode(np.ascontiguousarray(rows))

    def decode(self, buffer: Buffer, width: int) -> NDArray[np.float32]:
        """The rows in ``buffer`` as a new float32 [n, width]; n follows from the size.

        Raises CodecError for a size that does not fit (before anything is allocated) or bytes that no encoder writes.
        """
        n = self.rows_in(memoryview(buffer).nbytes, width)
        return self._decode(np.frombuffer(buffer, np.uint8).reshape(n, self.row_bytes(width)), width)


_CODECS = {
    made.name: made
    for made in (
        Codec("fp32", lambda width: 4 * width, floats.encode_fp32, floats.decode_fp32),
        Codec("bf16", lambda width: 2 * width, floats.encode_bf16, floats.decode_bf16),
        Codec("int8", int8.row_bytes, int8.encode, int8.decode),
        Codec("int4", int4.row_bytes, int4.encode, int4.decode),
    )
}

CODEC_NAMES = tuple(_CODECS)
"""What this node speaks, for its hello; the least lossy first."""


def codec(name: str) -> Codec:
    """Raises CodecError where no codec has that name."""
    found = _CODECS.get(name)
    if found is None:
        raise CodecError(f"there is no codec {name[:40]!r}", hint=f"known: {', '.join(CODEC_NAMES)}")
    return found


MANDATORY_CODECS = ("fp32", "bf16", "int8")
"""What every node speaks."""

SLOW_ROW_S = 0.02
"""A row that takes longer than this is worth a lossier codec. The next one saves about half of it per hop: less than 10 ms is
within the jitter of ordinary paths and would be paid for with worse text."""


def choose_codec(allowed: Sequence[str], theirs: Collection[str], *, width: int, rate_bytes_per_s: float | None = None) -> str:
    """The codec of one edge, named by the end that opens it.

    It is the first of ``allowed`` that the other end speaks. Where one of its rows takes longer than ``SLOW_ROW_S`` at the
    measured rate, it is the next one whose rows are smaller and fast enough, or the one with the smallest rows where none is.

    Args:
        allowed: by the session's owner, in order of preference.
        theirs: what the other end named in its hello.
        width: values of a row.
        rate_bytes_per_s: of the link in the direction of the rows; None or 0 where it was not measured.

    Raises:
        CodecError: nothing is in both, or the width is out of range.
    """
    common = [codec(name) for name in allowed if name in _CODECS and name in theirs]
    if not common:
        raise CodecError(
            f"no codec in common: the session allows {_listed(allowed)}, the next stage speaks {_listed(theirs)}",
            hint=f"allow one of {', '.join(MANDATORY_CODECS)}, which every node speaks",
        )
    if not rate_bytes_per_s:
        return common[0].name
    most = rate_bytes_per_s * SLOW_ROW_S
    fast = (found for found in common if found.row_bytes(width) <= most)
    return next(fast, min(common, key=lambda found: found.row_bytes(width))).name


def _listed(names: Collection[str]) -> str:
    """Some of a stranger's words, for a message."""
    return ", ".join(repr(name[:20]) for name in list(names)[:8]) or "none"

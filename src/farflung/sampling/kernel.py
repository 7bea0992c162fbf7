"""Philox words by the hundred thousand, as machine code.

At temperature 1 without truncation nearly every token of the vocabulary can win, so a row needs 150,000 words: 3 ms in numpy,
0.17 ms here. Numba is used where it is installed and runs; nothing but time depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

WordsKernel = Callable[[int, int, int, NDArray[np.uint32], NDArray[np.uint32]], None]
"""(key low, key high, position, ids, out): see ``sampling.noise.noise_words``."""


_BROKEN = (ImportError, OSError, AttributeError, SystemError)
"""What a numba raises that does not fit the rest of the installation."""


@cache
def words_kernel() -> WordsKernel | None:
    """The compiled kernel, or None where numba cannot be had. The first call takes a second or two: make it before serving."""
    try:
        from numba import config, njit, uint32, uint64
        from numba.core.errors import NumbaError
    except _BROKEN:  # not installed, not for this numpy or this Python, or a library that does not load
        return None
    if config.DISABLE_JIT:  # the same in Python would take minutes
        return None

    def words(low: int, high: int, position: int, ids: NDArray[np.uint32], out: NDArray[np.uint32]) -> None:
        word, half = uint64(0xFFFFFFFF), uint64(32)
        first, second = uint64(0xD2511F53), uint64(0xCD9E8D57)
        for i in range(len(ids)):
            c0, c1, c2, c3 = uint64(position), uint64(ids[i]), uint64(0), uint64(0)
            k0, k1 = uint64(low), uint64(high)
            for _ in range(10):
                product0 = c0 * first
                product1 = c2 * second
                c0, c1 = (product1 >> half) ^ c1 ^ k0, product1 & word
                c2, c3 = (product0 >> half) ^ c3 ^ k1, product0 & word
                k0 = (k0 + uint64(0x9E3779B9)) & word
                k1 = (k1 + uint64(0xBB67AE85)) & word
            out[i] = uint32(c0)

    signature = "void(uint64, uint64, uint64, uint32[::1], uint32[::1])"
    try:
        compiled: WordsKernel = njit(signature, nogil=True)(words)
    except (NumbaError, *_BROKEN):
        return None
    return compiled

"""A node's time as a function of tokens, the *T-curve* it announces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def time_ms(curve: Sequence[tuple[int, float]], tokens: int) -> float:
    """Milliseconds for one step of ``tokens``, by straight lines between the measured points.

    Below the first point the first time holds (a step has a floor); beyond the last one the last point's time per token.

    Args:
        curve: (tokens, milliseconds), tokens strictly rising, at least one point.
        tokens: at least 1.
    """
    first_tokens, first_ms = curve[0]
    if tokens <= first_tokens:
        return first_ms
    for (low, low_ms), (high, high_ms) in pairwise(curve):
        if tokens <= high:
            return low_ms + (high_ms - low_ms) * (tokens - low) / (high - low)
    last_tokens, last_ms = curve[-1]
    return last_ms * tokens / last_tokens


def tokens_within(curve: Sequence[tuple[int, float]], ms: float) -> int:
    """The most tokens such that one step of them, or of fewer, takes at most ``ms`` by ``time_ms``; 0 where one is too many.

    Args:
        curve: as for ``time_ms``. A measured one may fall somewhere; what counts is where it first exceeds ``ms``.
        ms: milliseconds.
    """
    if curve[0][1] > ms:
        return 0
    for (low, low_ms), (high, high_ms) in pairwise(curve):
        if high_ms > ms:
            return low + int((high - low) * (ms - low_ms) / (high_ms - low_ms))
    last_tokens, last_ms = curve[-1]
    return max(last_tokens, int(last_tokens * ms / last_ms)) if last_ms > 0 else last_tokens

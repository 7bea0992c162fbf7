"""What a link measures about its path, as pure structures: the time is passed in."""

from __future__ import annotations

from collections import deque

from farflung.wire.fragment import MAX_FRAGMENT_BYTES

_RECENT_ROUND_TRIPS = 8
_RECENT_BURSTS = 8
_LEAST_BURST_BYTES = 64 * 1024  # fewer say more about timers than about the path
_LONGEST_BURST_S = 0.5
_FRAGMENT_S = 0.002
_LEAST_FRAGMENT_BYTES = 1024  # below, headers and TLS records (30 bytes) weigh more than the delay saved


class RoundTrip:
    """The least of the recent round trips: queues and busy peers only ever add to it."""

    def __init__(self) -> None:
        self._sent: dict[int, float] = {}
        self._recent: deque[float] = deque(maxlen=_RECENT_ROUND_TRIPS)
        self._next_number = 0

    @property
    def seconds(self) -> float | None:
        return min(self._recent, default=None)

    def ping(self, now: float) -> int:
        """The number of a ping that leaves at ``now``. Of those unanswered, the last eight are remembered."""
        number = self._next_number
        self._next_number += 1
        self._sent[number] = now
        self._sent.pop(number - _RECENT_ROUND_TRIPS, None)
        return number

    def pong(self, number: int, now: float) -> None:
        """An answer; one to no ping of ours is ignored."""
        sent = self._sent.pop(number, None)
        if sent is not None:
            self._recent.append(now - sent)


class DeliveryRate:
    """The rate at which a path delivers when it is kept busy, timed where the bytes arrive.

    While a frame is half received its sender had more to send, so the path, not the sender, set the pace. The best of the
    recent bursts counts: one that is held up by slow start or by more urgent frames says too little.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT_BURSTS)
        self._since: float | None = None
        self._bytes = 0

    @property
    def bytes_per_s(self) -> float:
        """0 until measured."""
        return max(self._recent, default=0.0)

    def arrived(self, now: float, size: int, *, mid_frame: bool) -> None:
        """One read of ``size`` bytes; ``mid_frame`` says that it left a frame incomplete."""
        if self._since is None:
            if mid_frame:
                self._since, self._bytes = now, 0  # when these bytes began to arrive is not known: they only set the clock
            return
        self._bytes += size
        seconds = now - self._since
        if mid_frame and seconds < _LONGEST_BURST_S:
            return
        if self._bytes >= _LEAST_BURST_BYTES and seconds > 0:
            self._recent.append(self._bytes / seconds)
        self._since, self._bytes = (now, 0) if mid_frame else (None, 0)


def fragment_bytes_for(bytes_per_s: float | None) -> int:
    """What passes in 2 ms at that rate, a power of two of 1 to 16 KiB: an urgent frame waits for about one fragment."""
    if not bytes_per_s:
        return MAX_FRAGMENT_BYTES
    passes = int(min(bytes_per_s * _FRAGMENT_S, MAX_FRAGMENT_BYTES))
    return max(_LEAST_FRAGMENT_BYTES, 1 << (passes.bit_length() - 1) if passes else 0)

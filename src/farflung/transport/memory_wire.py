"""The paths of a memory network and the byte streams on them; see ``transport.memory`` for the whole.

A path delays, and lets bytes pass one after another at its rate. It is reliable, as tcp makes it: what is lost costs the
round trip of sending it again, and what comes after waits for it, so a stream never reorders.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from farflung.core.errors import FarflungError, LinkLost, UsageError
from farflung.core.ids import NodeId, short
from farflung.transport.byte_stream import RECORD_BYTES
from farflung.transport.frame_link import FrameLink

_EARLY_S = 1e-9
"""Timers fire early by up to the clock's resolution, and sums of floats are off by less."""

_UNSENT_BYTES = 32 * 1024


@dataclass(frozen=True, kw_only=True)
class LinkShape:
    """One direction of a path.

    Attributes:
        delay_s: from sending to arrival, at least.
        jitter_s: each fragment takes up to that much longer, evenly distributed.
        jitter_std_s: the delay varies around ``delay_s``, normally distributed with this deviation and never below 0 ...
        jitter_memory_s: ... and with that memory: a burst shares its delay, as it does behind a real queue.
        rate_bytes_per_s: at which bytes pass; None: at once.
        queue_bytes: that may wait to pass before the sender is told to stop: the delay that bulk can add.
        loss: chance of each fragment to be lost and sent again, a round trip later.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    jitter_std_s: float = 0.0
    jitter_memory_s: float = 0.02
    rate_bytes_per_s: float | None = None
    queue_bytes: int = _UNSENT_BYTES
    loss: float = 0.0

    def __post_init__(self) -> None:
        rate_is_right = self.rate_bytes_per_s is None or self.rate_bytes_per_s > 0
        times = (self.delay_s, self.jitter_s, self.jitter_std_s, self.jitter_memory_s)
        if not (min(times) >= 0 and rate_is_right and self.queue_bytes >= 0 and 0 <= self.loss < 1):
            raise UsageError(f"{self} is no path", hint="times and sizes are at least 0, rates above 0, loss below 1")


class Pipe:
    """Bytes pass one after another.

    Args:
        bytes_per_s: None: at once.
        queue_bytes: that may wait before ``room_at`` says to stop.
    """

    def __init__(self, bytes_per_s: float | None, queue_bytes: int = _UNSENT_BYTES) -> None:
        self.bytes_per_s = bytes_per_s
        self.queue_bytes = queue_bytes
        self._busy_until = 0.0

    def passed_at(self, start: float, size: int) -> float:
        """When ``size`` bytes that come at ``start`` are through, after all that came before."""
        if self.bytes_per_s is None:
            return start
        self._busy_until = max(self._busy_until, start) + size / self.bytes_per_s
        return self._busy_until

    def room_at(self) -> float:
        """When at most ``queue_bytes`` wait; in the past where that is so now."""
        return 0.0 if self.bytes_per_s is None else self._busy_until - self.queue_bytes / self.bytes_per_s


class Path:
    """One direction between two nodes, shared by all their links."""

    def __init__(self, shape: LinkShape, random: random.Random) -> None:
        self.silent = False
        self.wires: dict[MemoryWire, None] = {}
        self._random = random
        self._wander, self._wander_at = 0.0, -math.inf
        self._healed: list[asyncio.Future[None]] = []
        self.reshape(shape)

    def reshape(self, shape: LinkShape) -> None:
        self.shape = shape
        self.pipe = Pipe(shape.rate_bytes_per_s, shape.queue_bytes)

    def arrival(self, now: float, uplink: Pipe, size: int, round_trip_s: float) -> float:
        """When ``size`` bytes written at ``now`` arrive."""
        shape = self.shape
        at = self.pipe.passed_at(uplink.passed_at(now, size), size) + shape.delay_s
        if shape.jitter_s:
            at += self._random.uniform(0.0, shape.jitter_s)
        if shape.jitter_std_s:
            at += max(-shape.delay_s, shape.jitter_std_s * self._wandered(at, shape.jitter_memory_s))
        while shape.loss and self._random.random() < shape.loss:
            at += round_trip_s
        return at

    def _wandered(self, at: float, memory_s: float) -> float:
        """A standard normal value that at times apart by ``dt`` correlates by exp(-dt / memory) (Ornstein and Uhlenbeck)."""
        kept = math.exp(min(0.0, self._wander_at - at) / memory_s) if memory_s else 0.0
        self._wander = kept * self._wander + math.sqrt(1 - kept * kept) * self._random.gauss(0.0, 1.0)
        self._wander_at = at
        return self._wander

    def fall_silent(self) -> None:
        self.silent = True

    def heal(self) -> None:
        self.silent = False
        for wire in self.wires:
            wire.on_healed()
        healed, self._healed = self._healed, []
        for waiter in healed:
            if not waiter.done():
                waiter.set_result(None)

    async def audible(self) -> None:
        """Returns at once, or when the silence ends."""
        while self.silent:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._healed.append(waiter)
            await waiter


class _Flight(NamedTuple):
    at: float
    data: bytes | None  # None: the goodbye


class MemoryWire:
    """The sending half at one end of a link, and through ``other`` the receiving half of the other end.

    Args:
        ends: this end's node and the other end's.
        there: the path to it.
        back: the path from it.
        uplink: of the sender, shared by its wires.
        on_ended: called once nothing of this wire is left.
    """

    def __init__(
        self,
        ends: tuple[NodeId, NodeId],
        there: Path,
        back: Path,
        uplink: Pipe,
        on_ended: Callable[[MemoryWire], None],
    ) -> None:
        self.ends = ends
        self.link: FrameLink | None = None
        self.other: MemoryWire | None = None
        self._there = there
        self._back = back
        self._uplink = uplink
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._flights: deque[_Flight] = deque()
        self._stopped = False
        self._landing: asyncio.TimerHandle | None = None
        self._room: asyncio.TimerHandle | None = None
        self._limit: asyncio.TimerHandle | None = None
        there.wires[self] = None

    # ---- the wire ----

    @property
    def writable(self) -> bool:
        """Once it was seen to be false it stays so until ``on_writable``, though room comes with time alone."""
        if not self._stopped and not self._has_room():
            self._stopped = True
        return not self._stopped

    def write(self, data: bytes) -> int:
        size = len(data) + RECORD_BYTES
        round_trip_s = self._there.shape.delay_s + self._back.shape.delay_s
        self._send(_Flight(self._there.arrival(self._loop.time(), self._uplink, size, round_trip_s), data))
        return size

    def bound_unsent(self, size: int) -> None:
        """The shape says how much waits."""

    def finish(self, by: float) -> None:
        if self._limit is None and not self._ended.done():
            self._limit = self._loop.call_at(by, self._end)
            self._send(_Flight(self._loop.time() + self._there.shape.delay_s, None))

    async def ended(self) -> None:
        await asyncio.shield(self._ended)

    # ---- the network ----

    def reset(self, error: FarflungError) -> None:
        """Both halves of this end are gone, and its link is told."""
        self._end()
        if self.link is not None:
            self.link.on_wire_lost(error)

    def on_healed(self) -> None:
        """What was on the way during the silence is sent again."""
        soonest = self._loop.time() + self._there.shape.delay_s
        self._flights = deque(_Flight(max(flight.at, soonest), flight.data) for flight in self._flights)
        self._await_landing()
        self._resume()

    # ---- inside ----

    def _send(self, flight: _Flight) -> None:
        if self._ended.done():
            return
        last = self._flights[-1].at if self._flights else 0.0
        self._flights.append(flight if flight.at >= last else _Flight(last, flight.data))
        if self._landing is None:
            self._await_landing()

    def _await_landing(self) -> None:
        if self._landing is not None:
            self._landing.cancel()
        self._landing = self._loop.call_at(self._flights[0].at, self._land) if self._flights else None

    def _land(self) -> None:
        self._landing = None
        if self._there.silent:
            return  # until on_healed
        now = self._loop.time() + _EARLY_S
        try:
            while self._flights and self._flights[0].at <= now:
                self._hand_over(self._flights.popleft().data)
        finally:  # whatever the handler at the other end raises, the rest arrives
            self._await_landing()

    def _hand_over(self, data: bytes | None) -> None:
        link = self.other.link if self.other is not None else None
        if data is None:
            self._end()
            if link is not None:
                link.on_wire_lost(LinkLost(f"node {short(self.ends[0])} closed the link", hint="it was stopped"))
        elif link is not None:
            link.on_bytes([data], len(data) + RECORD_BYTES)

    def _has_room(self) -> bool:
        """Where there is none, sets the timer that looks again when there is."""
        if self._limit is not None or self._there.silent or self._ended.done():
            return False
        room_at = max(self._there.pipe.room_at(), self._uplink.room_at())
        if room_at <= self._loop.time() + _EARLY_S:
            return True
        if self._room is None:
            self._room = self._loop.call_at(room_at, self._on_room)
        return False

    def _on_room(self) -> None:
        self._room = None
        self._resume()

    def _resume(self) -> None:
        if self._stopped and self.link is not None and self._has_room():
            self._stopped = False
            self.link.on_writable()

    def _end(self) -> None:
        if self._ended.done():
            return
        self._ended.set_result(None)
        self._flights.clear()
        for timer in (self._landing, self._room, self._limit):
            if timer is not None:
                timer.cancel()
        del self._there.wires[self]
        self._on_ended(self)

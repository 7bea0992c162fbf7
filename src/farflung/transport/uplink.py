"""Who may use the node's uplink next: one scheduler for all links of a node.

``Schedule`` decides and is pure; ``Uplink`` writes. The rules:

- The most urgent priority goes first, whichever link or channel it is on.
- Frames of one channel never overtake each other: a channel is as urgent as its *first* frame.
- Channels of equal urgency take turns, a fragment each, so that a big frame delays the others by one fragment.
- A link whose kernel buffer is full is passed over until it has room; its channels keep their place in line.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from farflung.transport.link import Buffer, Priority
from farflung.wire.fragment import fragments

L = TypeVar("L")
Fragment = list[Buffer]

_TURN_BYTES = 128 * 1024
"""Written in one go before the event loop gets to read, about 0.2 ms of encryption."""


@dataclass
class _Queued:
    """A frame of which at least ``head`` has not been written."""

    priority: Priority
    size: int
    head: Fragment
    rest: Iterator[Fragment]


@dataclass(eq=False)
class _Lane(Generic[L]):
    """The frames of one channel."""

    of: _LinkLanes[L]
    channel: int
    frames: deque[_Queued] = field(default_factory=deque)


@dataclass(eq=False)
class _LinkLanes(Generic[L]):
    link: L
    lanes: dict[int, _Lane[L]] = field(default_factory=dict)
    parked: list[_Lane[L]] = field(default_factory=list)
    bytes: int = 0
    held: bool = False
    dropped: bool = False


class Schedule(Generic[L]):
    """Chooses the next fragment. Links are told apart by identity; all costs are O(1) per fragment."""

    def __init__(self) -> None:
        self._turns: tuple[deque[_Lane[L]], ...] = tuple(deque() for _ in Priority)
        self._links: dict[L, _LinkLanes[L]] = {}

    @property
    def idle(self) -> bool:
        """Nothing waits, but perhaps on links that are held."""
        return not any(self._turns)

    def queued_bytes(self, link: L) -> int:
        """Bytes of the link's frames that are not written to their end."""
        own = self._links.get(link)
        return own.bytes if own else 0

    def push(self, link: L, channel: int, priority: Priority, size: int, frame: Iterator[Fragment]) -> None:
        """Queues a frame of ``size`` bytes, given as its fragments (at least one)."""
        own = self._links.setdefault(link, _LinkLanes(link))
        own.bytes += size
        lane = own.lanes.get(channel)
        if lane is None:
            lane = own.lanes[channel] = _Lane(own, channel)
        lane.frames.append(_Queued(priority, size, next(frame), frame))
        if len(lane.frames) == 1:
            self._line_up(lane)

    def pop(self) -> tuple[L, Fragment] | None:
        """The fragment to write now, and on which link; None where nothing may be written."""
        for turns in self._turns:
            while turns:
                lane = turns.popleft()
                own = lane.of
                if own.dropped:
                    continue
                if own.held:
                    own.parked.append(lane)
                    continue
                return own.link, self._take(lane)
        return None

    def hold(self, link: L) -> None:
        """Passes the link over until ``release``."""
        self._links.setdefault(link, _LinkLanes(link)).held = True

    def release(self, link: L) -> None:
        own = self._links.get(link)
        if own is None:
            return
        own.held = False
        parked, own.parked = own.parked, []
        for lane in parked:
            self._line_up(lane)
        self._forget_if_empty(own)

    def drop(self, link: L) -> None:
        """Forgets all that is queued for the link."""
        own = self._links.pop(link, None)
        if own is not None:
            own.dropped = True

    def _line_up(self, lane: _Lane[L]) -> None:
        if lane.of.held:
            lane.of.parked.append(lane)
        else:
            self._turns[lane.frames[0].priority].append(lane)

    def _take(self, lane: _Lane[L]) -> Fragment:
        own, first = lane.of, lane.frames[0]
        fragment = first.head
        following = next(first.rest, None)
        if following is not None:
            first.head = following
        else:
            lane.frames.popleft()
            own.bytes -= first.size
        if lane.frames:
            self._line_up(lane)
        else:
            del own.lanes[lane.channel]
            self._forget_if_empty(own)
        return fragment

    def _forget_if_empty(self, own: _LinkLanes[L]) -> None:
        if not own.lanes and not own.held:
            self._links.pop(own.link, None)


class Sender(Protocol):
    """A link as the uplink sees it."""

    @property
    def writable(self) -> bool:
        """Its kernel buffer has room. Once false it stays so until the link calls ``Uplink.writable``."""

    @property
    def fragment_bytes(self) -> int:
        """Size to cut frames into."""

    def transmit(self, fragment: Fragment) -> None:
        """Writes to the kernel; never raises, a broken link ends itself later."""

    def drained(self) -> None:
        """Nothing is queued for the link any more."""


class Uplink:
    """The one uplink of a node, shared by its links. Lives on one event loop."""

    def __init__(self) -> None:
        self._schedule: Schedule[Sender] = Schedule()
        self._turn_is_due = False

    def queued_bytes(self, link: Sender) -> int:
        """Bytes accepted by ``send`` and not handed to the kernel."""
        return self._schedule.queued_bytes(link)

    def send(self, link: Sender, channel: int, priority: Priority, parts: Sequence[Buffer], size: int) -> None:
        """Writes the frame (``size`` bytes in ``parts``) now if nothing is in its way, else queues it."""
        frame = fragments(channel, priority, parts, link.fragment_bytes)
        if link.writable and self._schedule.idle:
            # The usual case. Nothing of this link can be queued: what it had was written when it became writable.
            link.transmit(next(frame))
            head = next(frame, None)
            if head is None:
                return
            frame = _prepend(head, frame)
        self._schedule.push(link, channel, priority, size, frame)
        if not link.writable:
            self._schedule.hold(link)
        elif not self._turn_is_due:
            self._turn()

    def writable(self, link: Sender) -> None:
        """The link has room again."""
        self._schedule.release(link)
        if not self._turn_is_due:
            self._turn()

    def drop(self, link: Sender) -> None:
        """The link is gone."""
        self._schedule.drop(link)

    def _turn(self) -> None:
        self._turn_is_due = False
        written = 0
        while written < _TURN_BYTES:
            choice = self._schedule.pop()
            if choice is None:
                return
            link, fragment = choice
            written += sum(map(len, fragment))
            link.transmit(fragment)
            if not link.writable:
                self._schedule.hold(link)
            if not self._schedule.queued_bytes(link):
                link.drained()
        if not self._schedule.idle:
            self._turn_is_due = True
            asyncio.get_running_loop().call_soon(self._turn)


def _prepend(head: Fragment, rest: Iterator[Fragment]) -> Iterator[Fragment]:
    yield head
    yield from rest

"""Who may use the node's uplink next: one scheduler for all links of a node.

``Schedule`` decides and is pure; ``Uplink`` writes. The rules:

- The most urgent priority goes first, whichever link or channel it is on.
- Frames of one channel never overtake each other: a channel is as urgent as the most urgent of its frames, so that what
  is in the way of an urgent frame goes as fast as that.
- Channels of equal urgency take turns, a fragment each, so that a big frame delays the others by one fragment.
- Of one link, 64 channels of each priority may be in the middle of a frame; the others wait, first come first served, until
  one of those frames ends. The other end keeps what is half received, and bounds it (``LinkConfig.max_partial_frames``).
- A link whose kernel buffer is full is passed over until it has room; its channels keep their place in line.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from farflung.core.errors import FarflungError, LinkOverloaded
from farflung.core.units import Bytes
from farflung.transport.link import Buffer, Priority
from farflung.wire.fragment import fragments, size_in_fragments

L = TypeVar("L")
Fragment = list[Buffer]

_TURN_BYTES = 128 * 1024
"""Written in one go before the event loop gets to read, about 0.2 ms of encryption."""

MOST_BEGUN = 64
"""Frames of one link and priority that may be begun and not ended: with four priorities, what ``LinkConfig`` lets arrive."""


@dataclass
class _Queued:
    """A frame of which at least ``head`` has not been written; ``following`` is what comes after it, if anything."""

    priority: Priority
    size: int
    head: Fragment
    following: Fragment | None
    rest: Iterator[Fragment]


@dataclass(eq=False)
class _Lane(Generic[L]):
    """The frames of one channel.

    Attributes:
        frames: in the order they were sent.
        counts: how many of them there are of each priority.
        urgency: the most urgent of those.
        place: where the lane stands in line.
        slot: the priority whose number of begun frames the first frame counts among, or is about to.
        is_begun: part of the first frame has been written.
    """

    of: _LinkLanes[L]
    channel: int
    frames: deque[_Queued] = field(default_factory=deque)
    counts: list[int] = field(default_factory=lambda: [0] * len(Priority))
    urgency: Priority = Priority.BULK
    place: _Line[L] = field(default_factory=OrderedDict)
    slot: Priority | None = None
    is_begun: bool = False


_Line = OrderedDict[_Lane[L], None]
"""Lanes in the order in which they get their turn. A lane stands in one place, and can leave it from the middle."""


@dataclass(eq=False)
class _LinkLanes(Generic[L]):
    """The lanes of one link: those that wait for room (``parked``), and by priority those that wait to begin a frame."""

    link: L
    slots: list[int]
    lanes: dict[int, _Lane[L]] = field(default_factory=dict)
    parked: _Line[L] = field(default_factory=OrderedDict)
    waiting: tuple[_Line[L], ...] = field(default_factory=lambda: tuple(OrderedDict() for _ in Priority))
    bytes: int = 0
    held: bool = False


class Schedule(Generic[L]):
    """Chooses the next fragment. Links are told apart by identity; all costs are O(1) per fragment.

    Args:
        most_begun: frames of one link and priority that may be begun and not ended.

    Attributes:
        bytes: of frames that are not written to their end, of all links.
    """

    def __init__(self, most_begun: int = MOST_BEGUN) -> None:
        self._most_begun = most_begun
        self._turns: tuple[_Line[L], ...] = tuple(OrderedDict() for _ in Priority)
        self._links: dict[L, _LinkLanes[L]] = {}
        self.bytes = 0

    @property
    def idle(self) -> bool:
        """Nothing waits, but perhaps on links that are held."""
        return not any(self._turns)

    def queued_bytes(self, link: L) -> int:
        """Bytes of the link's frames that are not written to their end."""
        own = self._links.get(link)
        return own.bytes if own else 0

    def heaviest(self) -> L | None:
        """The link with the most bytes queued."""
        return max(self._links, key=self.queued_bytes, default=None)

    def push(self, link: L, channel: int, priority: Priority, size: int, frame: Iterator[Fragment]) -> None:
        """Queues a frame of ``size`` bytes, given as its fragments (at least one)."""
        own = self._of(link)
        own.bytes += size
        self.bytes += size
        lane = own.lanes.get(channel)
        if lane is None:
            lane = own.lanes[channel] = _Lane(own, channel)
        is_more_urgent = not lane.frames or priority < lane.urgency
        lane.frames.append(_Queued(priority, size, next(frame), next(frame, None), frame))
        lane.counts[priority] += 1
        if is_more_urgent:
            lane.urgency = priority
            lane.place.pop(lane, None)
            if not lane.is_begun:
                self._free_slot(lane)
            self._line_up(lane)

    def pop(self) -> tuple[L, Fragment] | None:
        """The fragment to write now, and on which link; None where nothing may be written."""
        for turns in self._turns:
            while turns:
                lane, _ = turns.popitem(last=False)
                own = lane.of
                if not own.held:
                    return own.link, self._take(lane)
                self._stand(lane, own.parked)
        return None

    def hold(self, link: L) -> None:
        """Passes the link over until ``release``."""
        self._of(link).held = True

    def release(self, link: L) -> None:
        own = self._links.get(link)
        if own is None:
            return
        own.held = False
        while own.parked:
            lane, _ = own.parked.popitem(last=False)
            self._line_up(lane)
        self._forget_if_empty(own)

    def drop(self, link: L) -> None:
        """Forgets all that is queued for the link."""
        own = self._links.pop(link, None)
        if own is not None:
            self.bytes -= own.bytes
            for lane in own.lanes.values():
                lane.place.pop(lane, None)

    def _of(self, link: L) -> _LinkLanes[L]:
        own = self._links.get(link)
        if own is None:
            own = self._links[link] = _LinkLanes(link, [self._most_begun] * len(Priority))
        return own

    def _line_up(self, lane: _Lane[L]) -> None:
        """Puts a lane that stands nowhere at the end of the line it belongs in."""
        own, urgency = lane.of, lane.urgency
        if lane.slot is None and lane.frames[0].following is not None:  # about to begin a frame that it cannot end at once
            if not own.slots[urgency]:
                self._stand(lane, own.waiting[urgency])
                return
            own.slots[urgency] -= 1
            lane.slot = urgency
        self._stand(lane, own.parked if own.held else self._turns[urgency])

    @staticmethod
    def _stand(lane: _Lane[L], place: _Line[L]) -> None:
        lane.place = place
        place[lane] = None

    def _free_slot(self, lane: _Lane[L]) -> None:
        """The lane is no longer in the middle of a frame, or about to be; the first that waits for it may begin."""
        priority, lane.slot = lane.slot, None
        if priority is None:
            return
        lane.of.slots[priority] += 1
        if lane.of.waiting[priority]:
            first, _ = lane.of.waiting[priority].popitem(last=False)
            self._line_up(first)

    def _take(self, lane: _Lane[L]) -> Fragment:
        own, first = lane.of, lane.frames[0]
        fragment = first.head
        if first.following is not None:
            first.head, first.following = first.following, next(first.rest, None)
            lane.is_begun = True
            self._stand(lane, self._turns[lane.urgency])
            return fragment
        lane.frames.popleft()
        lane.counts[first.priority] -= 1
        lane.is_begun = False
        own.bytes -= first.size
        self.bytes -= first.size
        self._free_slot(lane)
        if lane.frames:
            lane.urgency = next(priority for priority in Priority if lane.counts[priority])
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

    def end(self, error: FarflungError) -> None:
        """Ends the link at once; it calls ``Uplink.drop``."""


class Uplink:
    """The one uplink of a node, shared by its links. Lives on one event loop.

    Args:
        max_bytes: that may wait for all links. Over it the link that most wait for is ended: it is the one that does not read.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._schedule: Schedule[Sender] = Schedule()
        self._turn_is_due = False

    def queued_bytes(self, link: Sender) -> int:
        """Bytes accepted by ``send`` and not handed to the kernel."""
        return self._schedule.queued_bytes(link)

    def send(self, link: Sender, channel: int, priority: Priority, parts: Sequence[Buffer], size: int) -> None:
        """Writes the frame (``size`` bytes in ``parts``) now if nothing is in its way, else queues it."""
        frame = fragments(channel, priority, parts, link.fragment_bytes)
        if link.writable and self._schedule.idle and size_in_fragments(size, link.fragment_bytes) <= link.fragment_bytes:
            # The usual case. Nothing of this link can be queued: what it had was written when it became writable.
            link.transmit(next(frame))
            return
        self._schedule.push(link, channel, priority, size, frame)
        if not self._shed(link):
            return
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

    def _shed(self, link: Sender) -> bool:
        """Keeps to the limit. Returns whether ``link`` lived."""
        while self._schedule.bytes > self._max_bytes:
            heaviest = self._schedule.heaviest()
            if heaviest is None:
                break
            queued = self._schedule.queued_bytes(heaviest)
            heaviest.end(
                LinkOverloaded(
                    f"{Bytes(self._schedule.bytes)} wait to be sent, at most {Bytes(self._max_bytes)} may; "
                    f"{Bytes(queued)} of it are for this peer, the most",
                    hint="the peer or the path to it is slower than what is sent",
                )
            )
        return self._schedule.queued_bytes(link) > 0

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

"""One link, many conversations: a *line* is one channel of one link, and a pool keeps the links.

Nodes and drivers share this: both keep one link per peer, warm, and carry every session between the two on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from farflung.core.errors import FarflungError, LinkLost, LinkOverloaded, Unreachable
from farflung.core.ids import NodeId, short
from farflung.core.messages import Message
from farflung.transport.link import Buffer, Frame, Link, Priority, Transport


class LineHandler(Protocol):
    """Whoever holds one end of a line. Called on the event loop; must not block."""

    def on_frame(self, line: Line, frame: Frame) -> None:
        """A frame for this line. Raising a FarflungError ends the whole link with it."""

    def on_lost(self, line: Line, error: FarflungError) -> None:
        """The link under the line is gone, once."""


class Line:
    """A channel of a link, bound to a handler until it is released."""

    def __init__(self, lines: _LinkLines, channel: int) -> None:
        self._lines = lines
        self.channel = channel

    @property
    def link(self) -> Link:
        return self._lines.link

    @property
    def peer(self) -> NodeId:
        return self._lines.link.peer

    def send(self, message: Message, buffers: Sequence[Buffer] = (), priority: Priority = Priority.CONTROL) -> int:
        """Queues a frame; returns its bytes as ``Link.send`` does. Raises LinkLost, LinkOverloaded, FrameTooLarge."""
        return self.link.send(self.channel, Frame(message, buffers), priority)

    def bind(self, handler: LineHandler) -> None:
        """Frames of this channel go to ``handler`` from now on."""
        self._lines.bind(self, handler)

    def release(self) -> None:
        """No more frames are wanted on this channel; late ones are dropped."""
        self._lines.release(self)


NewLine = Callable[[Line, Frame], None]
"""Called for a frame on a channel that nobody holds: may ``bind`` the line, or drop the frame."""


@dataclass(frozen=True, kw_only=True)
class PoolLimits:
    """What peers may hold of a pool.

    Attributes:
        links: accepted ones. One more, and the one that has carried nothing for the longest is ended.
        links_per_peer: one more, and its oldest is ended. Two, because two ends may dial each other at once.
        unused_after_s: an accepted link on which nothing was ever opened is ended after that long.
        idle_after_s: one on which nothing is open any more. Its driver may be thinking of the next question.
    """

    links: int = 512
    links_per_peer: int = 2
    unused_after_s: float = 30.0
    idle_after_s: float = 900.0


class LinkPool:
    """Links by peer: dialled once, reused while up, accepted ones included.

    Two nodes that dial each other at once have two links, and both serve. Accepted links are bounded, and nobody holds one for
    nothing (``PoolLimits``); those that this end dialled it keeps.

    Args:
        transport: dials.
        addresses_of: where a node listens now; raises Unreachable (or another FarflungError) where that is not known. It
            asks the signed directory, never a client.
        on_new_line: what to do with a frame on an unknown channel of the peer's; None drops it (drivers accept no sessions).
        dial_timeout_s: for finding and dialling one peer.
        limits: what peers may hold.
    """

    def __init__(
        self,
        transport: Transport,
        addresses_of: Callable[[NodeId], Awaitable[Sequence[str]]],
        on_new_line: NewLine | None = None,
        *,
        dial_timeout_s: float = 5.0,
        limits: PoolLimits | None = None,
    ) -> None:
        self._transport = transport
        self._addresses_of = addresses_of
        self._on_new_line = on_new_line
        self._dial_timeout_s = dial_timeout_s
        self._limits = limits or PoolLimits()
        self._accepted: dict[_LinkLines, None] = {}
        self._links: dict[NodeId, list[_LinkLines]] = {}  # the oldest first
        self._dials: dict[NodeId, _Dial] = {}
        self._tasks: set[asyncio.Task[Link]] = set()
        self._closed = False

    @property
    def links(self) -> list[Link]:
        """Every link that is up."""
        return [lines.link for of_peer in self._links.values() for lines in of_peer if lines.link.is_up]

    def adopt(self, link: Link) -> None:
        """Takes over an accepted link."""
        if self._closed:
            link.end(LinkLost(f"node {short(link.peer)} dialled while this end was closing"))
        dial = self._dials.pop(link.peer, None)
        self._make_room(link)
        lines = self._take(link, dialled=False)
        self._accepted[lines] = None
        lines.watch(self._limits.unused_after_s, self._limits.idle_after_s)
        if dial is not None:
            dial.up.set_result(lines)
            dial.task.cancel()

    async def line(self, peer: NodeId, handler: LineHandler) -> Line:
        """A fresh line to ``peer``, over the link there is or a new one.

        Raises Unreachable, WrongPeer, VersionMismatch, NotAdmitted; LinkLost where the link is lost at once, or this
        pool is closed.
        """
        lines = next((lines for lines in reversed(self._links.get(peer, [])) if lines.link.is_up), None)
        if lines is None:
            if self._closed:
                raise _closed(peer)
            dial = self._dials.get(peer)
            if dial is None:
                dial = self._dials[peer] = self._start_dial(peer)
            # Shielded: one waiter that gives up must not cancel the dialling for the others.
            lines = await asyncio.shield(dial.up)
        if not lines.link.is_up:
            raise LinkLost(f"the link to node {short(peer)} was lost as soon as it was there", hint="try again")
        line = Line(lines, lines.link.new_channel())
        line.bind(handler)
        return line

    async def close(self) -> None:
        """Ends every link, flushing what is queued, and every dial."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self.links))

    def _start_dial(self, peer: NodeId) -> _Dial:
        loop = asyncio.get_running_loop()
        dial = _Dial(loop.create_future(), loop.create_task(self._dial(peer), name=f"dial {short(peer)}"))
        self._tasks.add(dial.task)
        dial.task.add_done_callback(lambda _: self._dialled(peer, dial))
        return dial

    async def _dial(self, peer: NodeId) -> Link:
        try:
            async with asyncio.timeout(self._dial_timeout_s):
                return await self._transport.dial(peer, await self._addresses_of(peer))
        except TimeoutError:
            raise Unreachable(
                f"node {short(peer)} did not answer within {self._dial_timeout_s:.1f} s",
                hint="is it running, and is its announced address reachable from here?",
            ) from None

    def _dialled(self, peer: NodeId, dial: _Dial) -> None:
        """Tells those who wait, unless a link of the peer's was there first; one that came all the same is kept, too."""
        self._tasks.discard(dial.task)
        if self._dials.get(peer) is dial:
            del self._dials[peer]
        error = _closed(peer) if dial.task.cancelled() else dial.task.exception()
        lines = self._take(dial.task.result(), dialled=True) if error is None else None
        if dial.up.done():
            return
        if error is not None:
            dial.up.set_exception(error)
            dial.up.exception()  # retrieved, so that a failure nobody waits for any more is not reported as forgotten
        elif lines is not None:
            dial.up.set_result(lines)

    def _take(self, link: Link, *, dialled: bool) -> _LinkLines:
        lines = _LinkLines(link, 0 if dialled else 1, self._on_new_line, self._forget)
        of_peer = self._links.setdefault(link.peer, [])
        of_peer.append(lines)
        link.start(lines)
        up = [lines.link for lines in of_peer if lines.link.is_up]
        most = self._limits.links_per_peer
        for oldest in up[:-most]:
            oldest.end(LinkLost(f"node {short(link.peer)} has opened newer links, at most {most} are kept"))
        return lines

    def _make_room(self, link: Link) -> None:
        """Ends the accepted link that was idle longest where there are too many, or the new one where all are in use."""
        if len(self._accepted) < self._limits.links:
            return
        idle = min((lines for lines in self._accepted if not lines.handlers), key=lambda lines: lines.idle_since, default=None)
        full = f"{len(self._accepted)} links are open here, the limit"
        if idle is None:
            link.end(LinkOverloaded(f"{full}, and all of them are in use", hint="choose another node, or try again later"))
        else:
            idle.link.end(LinkOverloaded(f"{full}: node {short(idle.link.peer)} made the least use of its own"))

    def _forget(self, lines: _LinkLines) -> None:
        self._accepted.pop(lines, None)
        of_peer = self._links[lines.link.peer]
        of_peer.remove(lines)
        if not of_peer:
            del self._links[lines.link.peer]


class _Dial(NamedTuple):
    """``up`` is what waiters wait for: the link that ``task`` dials, or one that the peer dials meanwhile."""

    up: asyncio.Future[_LinkLines]
    task: asyncio.Task[Link]


class _LinkLines:
    """The handler of one link: hands each frame to the holder of its channel.

    Args:
        link: of which it is.
        own_parity: of the channels that this end hands out. A frame on such a one that nobody holds is late, or the peer took
            a number that is not its to take; it opens no line.
        on_new_line: of the pool.
        forget: called once the link is gone.
    """

    def __init__(self, link: Link, own_parity: int, on_new_line: NewLine | None, forget: Callable[[_LinkLines], None]) -> None:
        self.link = link
        self.handlers: dict[int, tuple[Line, LineHandler]] = {}
        self.idle_since = asyncio.get_running_loop().time()
        self._was_used = False
        self._timer: asyncio.TimerHandle | None = None
        self._own_parity = own_parity
        self._on_new_line = on_new_line
        self._forget = forget

    def bind(self, line: Line, handler: LineHandler) -> None:
        self.handlers[line.channel] = (line, handler)
        self._was_used = True

    def release(self, line: Line) -> None:
        if self.handlers.pop(line.channel, None) is not None and not self.handlers:
            self.idle_since = asyncio.get_running_loop().time()

    def watch(self, unused_after_s: float, idle_after_s: float) -> None:
        """Ends the link once nothing was open on it for so long; ``unused_after_s`` holds until something has been."""
        loop = asyncio.get_running_loop()
        patience_s = idle_after_s if self._was_used else unused_after_s
        idle_s = 0.0 if self.handlers else loop.time() - self.idle_since
        if idle_s >= patience_s:
            self.link.end(LinkLost(f"nothing was open on the link of node {short(self.link.peer)} for {idle_s:.0f} s"))
            return
        self._timer = loop.call_later(patience_s - idle_s, self.watch, unused_after_s, idle_after_s)

    def on_frame(self, link: Link, channel: int, frame: Frame) -> None:
        held = self.handlers.get(channel)
        if held is not None:
            line, handler = held
            handler.on_frame(line, frame)
            return
        if self._on_new_line is not None and channel % 2 != self._own_parity:
            self._on_new_line(Line(self, channel), frame)
        if channel not in self.handlers:
            link.idle_frame()

    def on_lost(self, link: Link, error: FarflungError) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._forget(self)
        held = list(self.handlers.values())
        self.handlers.clear()
        for line, handler in held:
            handler.on_lost(line, error)


def _closed(peer: NodeId) -> LinkLost:
    return LinkLost(f"this end is closing and talks to node {short(peer)} no more")


def try_send(line: Line | None, message: Message, buffers: Sequence[Buffer] = ()) -> None:
    """Sends a last word (a fault, a close) where there is still someone to hear it."""
    if line is None:
        return
    try:
        line.send(message, buffers)
    except FarflungError:
        return  # the peer is gone or takes no more; its own on_lost has said or will say so

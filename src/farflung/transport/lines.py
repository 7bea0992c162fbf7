"""One link, many conversations: a *line* is one channel of one link, and a pool keeps the links.

Nodes and drivers share this: both keep one link per peer, warm, and carry every session between the two on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from farflung.core.errors import FarflungError, Unreachable
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
        self._lines.handlers[self.channel] = (self, handler)

    def release(self) -> None:
        """No more frames are wanted on this channel; late ones are dropped."""
        self._lines.handlers.pop(self.channel, None)


NewLine = Callable[[Line, Frame], None]
"""Called for a frame on a channel that nobody holds: may ``bind`` the line, or drop the frame."""


class LinkPool:
    """Links by peer: dialled once, reused while up, accepted ones included.

    Args:
        transport: dials.
        addresses_of: where a node listens now; raises Unreachable (or another FarflungError) where that is not known. It
            asks the signed directory, never a client.
        on_new_line: what to do with a frame on an unknown channel; None drops it (drivers accept no sessions).
        dial_timeout_s: for finding and dialling one peer.
    """

    def __init__(
        self,
        transport: Transport,
        addresses_of: Callable[[NodeId], Awaitable[Sequence[str]]],
        on_new_line: NewLine | None = None,
        *,
        dial_timeout_s: float = 5.0,
    ) -> None:
        self._transport = transport
        self._addresses_of = addresses_of
        self._on_new_line = on_new_line
        self._dial_timeout_s = dial_timeout_s
        self._up: dict[NodeId, _LinkLines] = {}
        self._all: dict[int, _LinkLines] = {}
        self._dialling: dict[NodeId, asyncio.Task[_LinkLines]] = {}

    @property
    def links(self) -> list[Link]:
        """Every link that is up."""
        return [lines.link for lines in self._all.values()]

    def adopt(self, link: Link) -> None:
        """Takes over an accepted link."""
        lines = _LinkLines(link, self._on_new_line, self._forget)
        self._all[id(link)] = lines
        self._up[link.peer] = lines
        link.start(lines)

    async def line(self, peer: NodeId, handler: LineHandler) -> Line:
        """A fresh line to ``peer``, over the link there is or a new one.

        Raises Unreachable, WrongPeer, VersionMismatch.
        """
        lines = self._up.get(peer)
        if lines is None or not lines.link.is_up:
            task = self._dialling.get(peer)
            if task is None:
                task = asyncio.get_running_loop().create_task(self._dial(peer), name=f"dial {short(peer)}")
                self._dialling[peer] = task
                task.add_done_callback(lambda done: self._dialled(peer, done))
            # Shielded: one waiter that gives up must not cancel the dialling for the others.
            lines = await asyncio.shield(task)
        line = Line(lines, lines.link.new_channel())
        line.bind(handler)
        return line

    async def close(self) -> None:
        """Ends every link, flushing what is queued."""
        dialling = list(self._dialling.values())
        for task in dialling:
            task.cancel()
        await asyncio.gather(*dialling, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self.links))

    async def _dial(self, peer: NodeId) -> _LinkLines:
        try:
            async with asyncio.timeout(self._dial_timeout_s):
                link = await self._transport.dial(peer, await self._addresses_of(peer))
        except TimeoutError:
            raise Unreachable(
                f"node {short(peer)} did not answer within {self._dial_timeout_s:.1f} s",
                hint="is it running, and is its announced address reachable from here?",
            ) from None
        self.adopt(link)
        return self._up[peer]

    def _dialled(self, peer: NodeId, task: asyncio.Task[_LinkLines]) -> None:
        self._dialling.pop(peer, None)
        if not task.cancelled():
            task.exception()  # retrieved, so that a failure nobody waits for any more is not reported as forgotten

    def _forget(self, lines: _LinkLines) -> None:
        self._all.pop(id(lines.link), None)
        if self._up.get(lines.link.peer) is lines:
            del self._up[lines.link.peer]


class _LinkLines:
    """The handler of one link: hands each frame to the holder of its channel."""

    def __init__(self, link: Link, on_new_line: NewLine | None, forget: Callable[[_LinkLines], None]) -> None:
        self.link = link
        self.handlers: dict[int, tuple[Line, LineHandler]] = {}
        self._on_new_line = on_new_line
        self._forget = forget

    def on_frame(self, link: Link, channel: int, frame: Frame) -> None:
        held = self.handlers.get(channel)
        if held is not None:
            line, handler = held
            handler.on_frame(line, frame)
        elif self._on_new_line is not None:
            self._on_new_line(Line(self, channel), frame)

    def on_lost(self, link: Link, error: FarflungError) -> None:
        self._forget(self)
        held = list(self.handlers.values())
        self.handlers.clear()
        for line, handler in held:
            handler.on_lost(line, error)


def try_send(line: Line | None, message: Message, buffers: Sequence[Buffer] = ()) -> None:
    """Sends a last word (a fault, a close) where there is still someone to hear it."""
    if line is None:
        return
    try:
        line.send(message, buffers)
    except FarflungError:
        return  # the peer is gone or takes no more; its own on_lost has said or will say so

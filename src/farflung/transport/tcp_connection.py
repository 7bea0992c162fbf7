"""One tcp socket with TLS 1.3 over it: from the first byte to the last, as the ``Wire`` of a ``FrameLink``.

The greeting happens before anybody gets the link: TLS, then the key of the peer is judged, then both say hello. Whatever goes
wrong until then is told once to ``on_greeted``, within the handshake timeout; afterwards it is the link's to tell.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from farflung.core.errors import FarflungError, LinkLost
from farflung.core.ids import NodeId, short
from farflung.transport.address import format_address
from farflung.transport.byte_stream import FLUSH_S, RECORD_BYTES
from farflung.transport.frame_link import FrameLink
from farflung.transport.link_setup import LinkSetup
from farflung.transport.rates import source_of
from farflung.transport.tls import TlsStream
from farflung.wire.fragment import MAX_FRAGMENT_BYTES

_LEAST_UNSENT_BYTES = 4096  # below, the kernel would wake us for every other packet
_KERNEL_BOUNDS_UNSENT = sys.platform == "linux"
"""Elsewhere TCP_NOTSENT_LOWAT is missing, or decides only when the socket counts as writable and not how much it takes."""


class Acceptor(Protocol):
    """Where a connection was accepted: told when its socket is connected and when it is closed."""

    def connected(self, connection: TcpConnection, source: str) -> None:
        """It comes from ``source``; may abort it, or others."""

    def disconnected(self, connection: TcpConnection) -> None: ...


OnGreeted = Callable[["TcpConnection", FrameLink | None, FarflungError | None], None]


@dataclass(frozen=True)
class TcpSetup:
    """What all connections of one transport share.

    Attributes:
        links: what their links share.
        receive: bytes are received into it; shared, because asyncio fills it and hands it over without a step between.
        connections: those whose socket is not closed; a connection enters and leaves by itself.
    """

    links: LinkSetup
    receive: memoryview
    connections: dict[TcpConnection, None]


class TcpConnection(asyncio.BufferedProtocol):
    """A socket, accepted or dialled, and the link on it once there is one.

    Args:
        setup: shared.
        context: TLS of this direction.
        expect: called with the peer's node id as soon as it is proven; raises (WrongPeer) to turn it away.
        on_greeted: called once, with the link when it is up, or with the error.
        accepted_by: where it was accepted; None where this end dialled.
    """

    def __init__(
        self,
        setup: TcpSetup,
        context: ssl.SSLContext,
        expect: Callable[[NodeId], None],
        on_greeted: OnGreeted,
        *,
        accepted_by: Acceptor | None = None,
    ) -> None:
        self._setup = setup
        self._context = context
        self._tls: TlsStream | None = None  # until the other end has sent something: 45 KB that holding a socket must not cost
        self._expect = expect
        self._on_greeted: OnGreeted | None = on_greeted
        self._accepted_by = accepted_by
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._greet_by = self._loop.time() + setup.links.config.handshake_timeout_s
        self._timer = self._loop.call_at(self._greet_by, self._overdue)
        self._transport: asyncio.Transport | None = None
        self._link: FrameLink | None = None
        self._paused = False
        self._finishing = False
        self.remote = "an unknown address"
        self._source = ""

    # ---- the wire ----

    @property
    def writable(self) -> bool:
        return not (self._paused or self._finishing)

    def write(self, data: bytes) -> int:
        if self._finishing or self._transport is None or self._tls is None:
            return 0
        records = self._tls.encrypt(data)
        self._transport.write(records)
        return len(records)

    def bound_unsent(self, size: int) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if _KERNEL_BOUNDS_UNSENT:
            opened: socket.socket = self._transport.get_extra_info("socket")
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, max(size, _LEAST_UNSENT_BYTES))
        else:
            self._transport.set_write_buffer_limits(high=size)

    def finish(self, by: float) -> None:
        if self._finishing:
            return
        self._finishing = True
        self._timer.cancel()
        if self._transport is None:
            return
        # Half-closed: the peer gets all that was written, and closes in turn. Closing at once would reset the connection
        # where bytes of the peer are unread, and destroy what it has not read yet.
        self._timer = self._loop.call_at(by, self.abort)
        if self._tls is not None:
            self._transport.write(self._tls.goodbye())
        try:
            self._transport.write_eof()
        except OSError:  # the peer has reset the connection and the loop does not know yet
            self.abort()

    def abort(self, error: FarflungError | None = None) -> None:
        """Ends the connection here and now; whoever waits for it or holds its link is told ``error``."""
        is_news = not self._finishing
        self._finishing = True
        self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        if is_news:
            self._tell(error or LinkLost(f"the connection with {self._name()} was broken off by this end"))

    async def ended(self) -> None:
        await asyncio.shield(self._ended)

    # ---- the transport ----

    async def close(self) -> None:
        """Closes the link, or breaks the greeting off, and waits until the socket is closed."""
        if self._link is not None:
            await self._link.close()
        else:
            self.abort(LinkLost("this transport was closed during the handshake"))
            # Not for ever: where a socket dies while it is accepted, asyncio may forget it without a word.
            await asyncio.wait([self._ended], timeout=FLUSH_S)

    # ---- asyncio.BufferedProtocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._setup.connections[self] = None
        if self._finishing:  # called off between accepting and now
            self._transport.abort()
            return
        name = transport.get_extra_info("peername")
        if name:
            self.remote, self._source = format_address(*name[:2]), source_of(name[0])
        if self._accepted_by is not None:
            self._accepted_by.connected(self, self._source)
            if self._finishing:  # turned away
                return
        opened: socket.socket = transport.get_extra_info("socket")
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if _KERNEL_BOUNDS_UNSENT:
            self._transport.set_write_buffer_limits(high=0)  # what the kernel refuses is the limit
        self.bound_unsent(2 * MAX_FRAGMENT_BYTES)
        if self._accepted_by is None:
            self._shake_hands(self._stream())

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._setup.receive

    def buffer_updated(self, nbytes: int) -> None:
        if self._finishing:
            return
        tls = self._stream()
        tls.feed(self._setup.receive[:nbytes])
        if self._link is None:
            self._shake_hands(tls)
        if self._link is not None:
            self._read(tls, self._link)

    def eof_received(self) -> bool:
        self._lose(f"{self._name()} ended the connection without a goodbye", "its process has probably died; look at its log")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        reason = f": {exc}" if exc is not None else ""
        self._lose(f"the connection with {self._name()} broke{reason}", "its process or the network between has failed")
        self._finishing = True
        self._timer.cancel()
        del self._setup.connections[self]
        if self._accepted_by is not None:
            self._accepted_by.disconnected(self)
        self._ended.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._link is not None and not self._finishing:
            self._link.on_writable()

    # ---- inside ----

    def _stream(self) -> TlsStream:
        if self._tls is None:
            self._tls = TlsStream(self._context, server_side=self._accepted_by is not None)
        return self._tls

    def _shake_hands(self, tls: TlsStream) -> None:
        try:
            done = tls.shake_hands()
            self._send(tls.take_outgoing())
            if not done:
                return
            peer = tls.peer
            self._expect(peer)
        except ssl.SSLError as error:
            self._send(tls.take_outgoing())  # the alert that says why
            self._lose(
                f"{self._name()} does not speak TLS 1.3 as a node does: {_reason(error)}",
                "is the port right, and is that a node of this swarm?",
            )
            return
        except FarflungError as error:
            self._greeted(None, error)
            self.finish(self._loop.time() + FLUSH_S)
            return
        self._timer.cancel()
        self._link = FrameLink(
            peer,
            self,
            self._setup.links,
            dialled=self._accepted_by is None,
            source=self._source,
            greet_by=self._greet_by,
            on_greeted=lambda link, error: self._greeted(link if error is None else None, error),
        )

    def _read(self, tls: TlsStream, link: FrameLink) -> None:
        try:
            chunks = tls.read()
        except ssl.SSLError as error:
            self._send(tls.take_outgoing())
            self._lose(f"{self._name()} broke TLS: {_reason(error)}", "it refused our key, or something on the way garbles it")
            return
        self._send(tls.take_outgoing())
        link.on_bytes(chunks, sum(map(len, chunks)) + RECORD_BYTES * len(chunks))
        if tls.peer_said_goodbye:
            self._lose(f"{self._name()} closed the link", "it was stopped, or no longer needs this link")

    def _send(self, data: bytes) -> None:
        if data and self._transport is not None:
            self._transport.write(data)

    def _overdue(self) -> None:
        self._lose(
            f"{self._name()} did not finish the TLS handshake within {self._setup.links.config.handshake_timeout_s:.1f} s",
            "is the port right, and is that node overloaded?",
        )

    def _lose(self, message: str, hint: str) -> None:
        if self._finishing:
            return
        self._tell(LinkLost(message, hint=hint))
        self.finish(self._loop.time() + FLUSH_S)

    def _tell(self, error: FarflungError) -> None:
        if self._link is not None:
            self._link.on_wire_lost(error)
        else:
            self._greeted(None, error)

    def _greeted(self, link: FrameLink | None, error: FarflungError | None) -> None:
        tell, self._on_greeted = self._on_greeted, None
        if tell is not None:
            tell(self, link, error)

    def _name(self) -> str:
        return "the other end" if self._link is None else f"node {short(self._link.peer)} at {self.remote}"


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()

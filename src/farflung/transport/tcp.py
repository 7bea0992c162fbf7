"""The tcp transport: links over TLS 1.3 between sockets, each end pinned to the other's node id."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence

from farflung.core.errors import AddressInUse, FarflungError, LinkLost, LinkOverloaded, NobodyListens, Unreachable, UsageError
from farflung.core.ids import NodeId
from farflung.core.messages import Hello
from farflung.identity import Identity, SwarmKey, client_context, server_context
from farflung.transport.address import format_address, parse_address
from farflung.transport.dialling import OnRefused, check_peer, first_that_answers, settle
from farflung.transport.frame_link import FrameLink
from farflung.transport.gate import Gate, GateConfig
from farflung.transport.hello import HELLO
from farflung.transport.link import Link, LinkConfig, Listener
from farflung.transport.link_setup import LinkSetup
from farflung.transport.tcp_connection import TcpConnection, TcpSetup

_RECEIVE_BYTES = 256 * 1024
_BACKLOG = 16
"""Connections that wait in the kernel, and that asyncio accepts in one go. At 128 a flood of them held everything else up by
65 ms a turn, at 16 by 3 (measured); who finds the queue full is retried by its own kernel."""


class TcpTransport:
    """See ``Transport``. One event loop, one uplink, any number of links and listeners.

    Args:
        identity: the key that is this node.
        config: limits and rhythms of all links.
        hello: what this node speaks.
        swarm_key: of a private swarm: who does not know it is turned away (NotAdmitted), dialled or dialling.
        gate: what each of its listeners takes.
        on_refused: for the log; connections that fail before they are links have no handler to tell.
    """

    def __init__(
        self,
        identity: Identity,
        config: LinkConfig | None = None,
        *,
        hello: Hello = HELLO,
        swarm_key: SwarmKey | None = None,
        gate: GateConfig | None = None,
        on_refused: OnRefused | None = None,
    ) -> None:
        self._node_id = identity.node_id
        self._client_context = client_context(identity)
        self._server_context = server_context(identity)
        self._on_refused = on_refused
        self._gate = gate or GateConfig()
        links = LinkSetup.of(self._node_id, config or LinkConfig(), hello, swarm_key)
        self._setup = TcpSetup(links, memoryview(bytearray(_RECEIVE_BYTES)), {})
        self._listeners: dict[TcpListener, None] = {}
        self._closed = False

    @property
    def node_id(self) -> NodeId:
        return self._node_id

    async def dial(self, peer: NodeId, addresses: Sequence[str]) -> Link:
        return await first_that_answers(
            peer, addresses, lambda address: self._dial(peer, address), timeout_s=self._setup.links.config.handshake_timeout_s
        )

    async def listen(self, address: str, on_link: Callable[[Link], None]) -> Listener:
        host, port = parse_address(address)
        loop = asyncio.get_running_loop()
        listener = TcpListener(self._gate, on_link, self._on_refused, self._forget)
        try:
            server = await loop.create_server(lambda: self._accept(listener), host, port, backlog=_BACKLOG)
        except OSError as error:
            raise _cannot_listen(address, error) from error
        listener.serve(server)
        self._listeners[listener] = None
        return listener

    async def close(self) -> None:
        self._closed = True
        await asyncio.gather(*(listener.close() for listener in list(self._listeners)))
        await asyncio.gather(*(connection.close() for connection in list(self._setup.connections)))

    async def _dial(self, peer: NodeId, address: str) -> FrameLink:
        loop = asyncio.get_running_loop()
        greeted: asyncio.Future[FrameLink] = loop.create_future()

        def connect() -> TcpConnection:
            return TcpConnection(
                self._setup,
                self._client_context,
                lambda found: check_peer(peer, found, address),
                lambda _, link, error: settle(greeted, link, error),
            )

        host, port = parse_address(address)
        if self._closed:
            raise UsageError("this transport is closed and dials no more")
        try:
            _, connection = await loop.create_connection(connect, host, port, happy_eyeballs_delay=0.25)
        except ConnectionRefusedError as error:
            raise NobodyListens(error.strerror or str(error)) from error
        except OSError as error:
            raise Unreachable(error.strerror or str(error)) from error
        try:
            if self._closed:
                raise Unreachable("this transport was closed while it dialled")
            return await greeted
        except BaseException:
            greeted.cancel()
            connection.abort()
            await connection.ended()
            raise

    def _accept(self, listener: TcpListener) -> TcpConnection:
        if listener.closed:
            # asyncio drops such a socket without a word to its protocol, so there had better be none.
            raise LinkLost(f"a connection came to {listener.address} while that was closed")
        connection = TcpConnection(self._setup, self._server_context, _anybody, listener.on_greeted, accepted_by=listener)
        listener.accepted(connection)
        return connection

    def _forget(self, listener: TcpListener) -> None:
        self._listeners.pop(listener, None)


class TcpListener:
    """See ``Listener``. Made by ``TcpTransport.listen``."""

    def __init__(
        self,
        gate: GateConfig,
        on_link: Callable[[Link], None],
        on_refused: OnRefused | None,
        on_closed: Callable[[TcpListener], None],
    ) -> None:
        self.closed = False
        self._gate: Gate[TcpConnection] = Gate(gate)
        self._on_closed = on_closed
        self._on_link = on_link
        self._on_refused = on_refused
        self._server: asyncio.Server | None = None
        self._greeting: dict[TcpConnection, None] = {}
        self._address = ""

    @property
    def address(self) -> str:
        return self._address

    def serve(self, server: asyncio.Server) -> None:
        """Hands over the server that accepts for this listener."""
        self._server = server
        self._address = format_address(*server.sockets[0].getsockname()[:2])

    def accepted(self, connection: TcpConnection) -> None:
        """A socket was accepted; where from is known only when it is connected."""
        self._greeting[connection] = None

    def connected(self, connection: TcpConnection, source: str) -> None:
        try:
            surplus = self._gate.enter(connection, source, asyncio.get_running_loop().time())
        except FarflungError as error:
            connection.abort(error)
            return
        if surplus is not None:
            surplus.abort(LinkOverloaded("too many connections have not finished their handshake; the oldest was dropped"))

    def disconnected(self, connection: TcpConnection) -> None:
        self._gate.left(connection)

    def on_greeted(self, connection: TcpConnection, link: FrameLink | None, error: FarflungError | None) -> None:
        """The connection has become a link, or never will."""
        self._greeting.pop(connection, None)
        self._gate.greeted(connection)
        if link is not None:
            self._on_link(link)
        elif error is not None and self._on_refused is not None:
            self._on_refused(connection.remote, error)

    async def close(self) -> None:
        self.closed = True
        self._on_closed(self)
        if self._server is not None:
            self._server.close()  # and not wait_closed(): from Python 3.12.1 on that waits for all links, too
        await asyncio.gather(*(connection.close() for connection in list(self._greeting)))


def _anybody(_: NodeId) -> None:
    """Whoever dials is known by its key from here on; what it may do is for others to judge."""


def _cannot_listen(address: str, error: OSError) -> FarflungError:
    if error.errno == errno.EADDRINUSE:
        return AddressInUse(
            f"{address} is taken by another program",
            hint="stop that program, or listen on another port (port 0 takes any that is free)",
        )
    if isinstance(error, PermissionError):
        return Unreachable(f"this user may not listen on {address}", hint="take a port from 1024 up")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return UsageError(f"no file descriptor is left to listen on {address}", hint="raise the limit: ulimit -n 4096")
    return Unreachable(
        f"nothing can listen on {address}: {error.strerror or error}",
        hint="the host part must be an address of this machine, or 0.0.0.0 for all of them",
    )

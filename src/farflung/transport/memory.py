"""A network in memory: links with the shape of any path, on the event loop's clock.

It speaks the same frames, fragments, priorities and heartbeats as tcp (the code above the byte stream is the same), so what is
built on links can be tested without sockets, through hours in seconds on a virtual clock (``lab.virtual_clock``), and with
faults: a path that is cut, one that falls silent, a node that dies. Everything that happens follows from the seed.

    network = MemoryNetwork(random.Random(7), shape=LinkShape(delay_s=0.05, rate_bytes_per_s=1.25e6))
    alice, bob = network.endpoint(alice_id), network.endpoint(bob_id)
    listener = await bob.listen("bob:0", on_link)
    link = await alice.dial(bob_id, [listener.address])
    network.silence(alice_id, bob_id)
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from farflung.core.errors import AddressInUse, FarflungError, LinkLost, NobodyListens, Unreachable, UsageError
from farflung.core.ids import NodeId, short
from farflung.core.messages import Hello
from farflung.identity.swarm_key import SwarmKey
from farflung.transport.address import format_address, parse_address
from farflung.transport.dialling import OnRefused, check_peer, first_that_answers, settle
from farflung.transport.frame_link import FrameLink
from farflung.transport.hello import HELLO
from farflung.transport.link import Link, LinkConfig, Listener
from farflung.transport.link_setup import LinkSetup
from farflung.transport.memory_wire import LinkShape, MemoryWire, Path, Pipe

__all__ = ["LinkShape", "MemoryListener", "MemoryNetwork", "MemoryTransport"]

OnGreeted = Callable[[FrameLink, FarflungError | None], None]


class MemoryNetwork:
    """All nodes of one world. Belongs to one event loop.

    Args:
        random: draws jitter and loss.
        config: limits and rhythms of all links.
        shape: of every path that ``shape`` does not name; ideal by default.
        shape_of: gives that of the path from one node to another instead, asked when the path is first used.
    """

    def __init__(
        self,
        random: random.Random,
        *,
        config: LinkConfig | None = None,
        shape: LinkShape | None = None,
        shape_of: Callable[[NodeId, NodeId], LinkShape] | None = None,
    ) -> None:
        self.config = config or LinkConfig()
        self._random = random
        ordinary = shape or LinkShape()
        self._shape_of = shape_of or (lambda _, __: ordinary)
        self._paths: dict[tuple[NodeId, NodeId], Path] = {}
        self._wires: dict[MemoryWire, MemoryTransport] = {}
        self._listeners: dict[str, MemoryListener] = {}
        self._next_port = 40000

    def endpoint(
        self,
        node_id: NodeId,
        *,
        uplink_bytes_per_s: float | None = None,
        hello: Hello = HELLO,
        swarm_key: SwarmKey | None = None,
        on_refused: OnRefused | None = None,
    ) -> MemoryTransport:
        """A transport for one node.

        Args:
            node_id: who it is; there are no keys, the network takes its word.
            uplink_bytes_per_s: what the node can send to all others together; None: as much as the paths take.
            hello: what it speaks.
            swarm_key: as of ``TcpTransport``.
            on_refused: as of ``TcpTransport``.
        """
        links = LinkSetup.of(node_id, self.config, hello, swarm_key)
        return MemoryTransport(self, links, Pipe(uplink_bytes_per_s), on_refused)

    def shape(self, a: NodeId, b: NodeId, there: LinkShape, back: LinkShape | None = None) -> None:
        """Shapes the path from ``a`` to ``b``, and the one back by ``back`` or alike. Holds for what is sent from now on."""
        self._path(a, b).reshape(there)
        self._path(b, a).reshape(back or there)

    def cut(self, a: NodeId, b: NodeId) -> None:
        """Resets every link between the two, at once and on both sides (LinkLost). They may dial again."""
        self._reset(f"the path between nodes {short(a)} and {short(b)} was cut", lambda ends: ends in ((a, b), (b, a)))

    def silence(self, a: NodeId, b: NodeId) -> None:
        """From now on nothing arrives between the two and nobody is told: links die after ``dead_after_s``, dials time out."""
        self._path(a, b).fall_silent()
        self._path(b, a).fall_silent()

    def heal(self, a: NodeId, b: NodeId) -> None:
        """Ends a silence. What was sent meanwhile arrives now, on links that lived through it."""
        self._path(a, b).heal()
        self._path(b, a).heal()

    def crash(self, node_id: NodeId) -> None:
        """What others see of a process that is killed: its links are reset (at its own end, too), its listeners are gone."""
        for address in [address for address, listener in self._listeners.items() if listener.node_id == node_id]:
            del self._listeners[address]
        self._reset(f"the process of node {short(node_id)} died", lambda ends: node_id in ends)

    # ---- for the transports ----

    def listen(self, address: str, listener: MemoryListener) -> str:
        """Puts a listener at ``host:port``; returns the address with the real port."""
        host, port = parse_address(address)
        if port == 0:
            port = self._next_port
            self._next_port += 1
        real = format_address(host, port)
        if real in self._listeners:
            raise AddressInUse(f"{real} is taken by node {short(self._listeners[real].node_id)}", hint="listen on another port")
        self._listeners[real] = listener
        return real

    def unlisten(self, whose: MemoryListener | MemoryTransport) -> None:
        """Takes a listener away, or all of a transport."""
        for address in [at for at, listener in self._listeners.items() if whose in (listener, listener.transport)]:
            del self._listeners[address]

    async def reach(self, caller: NodeId, address: str) -> MemoryListener:
        """The listener at an address, after the two round trips of tcp's and TLS's handshakes. Raises Unreachable."""
        parse_address(address)
        listener = self._listeners.get(address)
        if listener is None:
            raise NobodyListens("connection refused", hint="the node there has stopped, or listens elsewhere")
        there, back = self._path(caller, listener.node_id), self._path(listener.node_id, caller)
        for _ in range(2):
            await there.audible()
            await back.audible()
            await asyncio.sleep(there.shape.delay_s + back.shape.delay_s)
        if self._listeners.get(address) is not listener:
            raise Unreachable("connection reset", hint="the node there has just stopped")
        return listener

    def connect(self, dialler: MemoryTransport, listener: MemoryListener, on_greeted: OnGreeted) -> FrameLink:
        """Both ends of a new link; returns the dialler's. The hellos are on their way."""
        caller, callee = dialler.node_id, listener.node_id
        there, back = self._path(caller, callee), self._path(callee, caller)
        ours = MemoryWire((caller, callee), there, back, dialler.pipe, self._forget)
        theirs = MemoryWire((callee, caller), back, there, listener.transport.pipe, self._forget)
        ours.other, theirs.other = theirs, ours
        self._wires[ours], self._wires[theirs] = dialler, listener.transport
        listener.transport.attach(theirs, dialled=False, on_greeted=listener.on_greeted)
        return dialler.attach(ours, dialled=True, on_greeted=on_greeted)

    def links_of(self, transport: MemoryTransport) -> list[FrameLink]:
        """All that are not ended, greeting ones included."""
        return [wire.link for wire, owner in self._wires.items() if owner is transport and wire.link is not None]

    def _path(self, sender: NodeId, receiver: NodeId) -> Path:
        path = self._paths.get((sender, receiver))
        if path is None:
            path = self._paths[sender, receiver] = Path(self._shape_of(sender, receiver), self._random)
        return path

    def _reset(self, why: str, chosen: Callable[[tuple[NodeId, NodeId]], bool]) -> None:
        for wire in [wire for wire in self._wires if chosen(wire.ends)]:
            wire.reset(LinkLost(why, hint="dial again, or take another node"))

    def _forget(self, wire: MemoryWire) -> None:
        self._wires.pop(wire, None)


class MemoryTransport:
    """See ``Transport``. Made by ``MemoryNetwork.endpoint``."""

    def __init__(self, network: MemoryNetwork, links: LinkSetup, pipe: Pipe, on_refused: OnRefused | None) -> None:
        self.pipe = pipe
        self.on_refused = on_refused
        self._network = network
        self._links = links
        self._closed = False

    @property
    def node_id(self) -> NodeId:
        return self._links.me

    async def dial(self, peer: NodeId, addresses: Sequence[str]) -> Link:
        return await first_that_answers(
            peer, addresses, lambda address: self._dial(peer, address), timeout_s=self._network.config.handshake_timeout_s
        )

    async def listen(self, address: str, on_link: Callable[[Link], None]) -> Listener:
        return MemoryListener(self, self._network, address, on_link)

    async def close(self) -> None:
        self._closed = True
        self._network.unlisten(self)
        await asyncio.gather(*(link.close() for link in self._network.links_of(self)))

    def attach(self, wire: MemoryWire, *, dialled: bool, on_greeted: OnGreeted) -> FrameLink:
        """A link of this node over ``wire``."""
        greet_by = asyncio.get_running_loop().time() + self._links.config.handshake_timeout_s
        wire.link = FrameLink(
            wire.ends[1], wire, self._links, dialled=dialled, source=wire.ends[1], greet_by=greet_by, on_greeted=on_greeted
        )
        return wire.link

    async def _dial(self, peer: NodeId, address: str) -> FrameLink:
        if self._closed:
            raise UsageError("this transport is closed and dials no more")
        listener = await self._network.reach(self.node_id, address)
        check_peer(peer, listener.node_id, address)
        if self._closed:
            raise Unreachable("this transport was closed while it dialled")
        greeted: asyncio.Future[FrameLink] = asyncio.get_running_loop().create_future()
        link = self._network.connect(self, listener, lambda link, error: settle(greeted, link, error))
        try:
            return await greeted
        except BaseException:
            greeted.cancel()
            await link.close()
            raise


class MemoryListener:
    """See ``Listener``. Made by ``MemoryTransport.listen``."""

    def __init__(
        self, transport: MemoryTransport, network: MemoryNetwork, address: str, on_link: Callable[[Link], None]
    ) -> None:
        self.transport = transport
        self._network = network
        self._on_link = on_link
        self._address = network.listen(address, self)

    @property
    def node_id(self) -> NodeId:
        return self.transport.node_id

    @property
    def address(self) -> str:
        return self._address

    async def close(self) -> None:
        self._network.unlisten(self)

    def on_greeted(self, link: FrameLink, error: FarflungError | None) -> None:
        """The other end has said hello, or the link never came up."""
        if error is None:
            self._on_link(link)
        elif self.transport.on_refused is not None:
            self.transport.on_refused(short(link.peer), error)

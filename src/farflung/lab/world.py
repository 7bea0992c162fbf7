"""A whole swarm - directory, nodes, drivers - in one process over memory links, on any event loop.

The code is the one that serves; only the ports differ: memory instead of TLS and HTTP, and backends that may be replays. Keys,
session ids and jitter come from the seed, so that two runs on a virtual clock are the same run.

    async with World(WorldConfig(seed=7)) as world:
        for number, layers in enumerate(ranges):
            await world.add_node(f"n{number}", make_backend(layers), NodeConfig(t_curve_ms=curve), profile("fiber"))
        swarm = await world.add_driver("alice", spec, profile("cable"))
        text = await swarm.generate(prompt).text()
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from random import Random
from types import TracebackType
from typing import Self

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from farflung.core.errors import Unreachable, UsageError
from farflung.core.ids import NodeId
from farflung.core.model import ModelSpec
from farflung.engine.backend import StageBackend
from farflung.identity.keys import Identity
from farflung.lab.access import Access, path_shape
from farflung.node.service import Node, NodeConfig, NodePorts
from farflung.session.swarm import DriverPorts, Swarm
from farflung.swarm.directory import Change, Directory
from farflung.swarm.links import MeasuredLink, SignedLinks
from farflung.swarm.memory_directory import MemoryDirectory
from farflung.swarm.records import EVERYTHING, NodeRecord, Query, SignedRecord, SignedWithdrawal
from farflung.swarm.service import DirectoryService, ServiceConfig
from farflung.transport.link import Link, LinkConfig, Listener, Transport
from farflung.transport.memory import LinkShape, MemoryNetwork

START_UNIX_S = 1_700_000_000.0
"""The wall clock at the loop's time 0 is as good as any: nothing depends on it but signed times."""


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """How a world is made.

    Attributes:
        seed: of everything that is drawn.
        link: limits and rhythms of all links.
        wrap_transport: what members talk through instead of their transport, e.g. one that writes down all frames.
        wrap_directory: what the member of that name sees of the directory.
    """

    seed: int = 1
    link: LinkConfig = field(default_factory=LinkConfig)
    wrap_transport: Callable[[Transport], Transport] = lambda transport: transport
    wrap_directory: Callable[[str, Directory], Directory] = lambda _, directory: directory


class World:
    """Use it as an async context manager. At its end drivers leave and nodes drain; the directory does not hear of that any
    more, because then every node would be told of every other's leaving.

    Attributes:
        network: to break.
        service: the directory.
        nodes, backends, swarms: by name.
    """

    def __init__(self, config: WorldConfig) -> None:
        self._config = config
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        self._clock: Callable[[], float] = lambda: START_UNIX_S + loop.time() - began_s
        self._access: dict[NodeId, Access] = {}
        self._ids: dict[str, NodeId] = {}
        self._drivers = AsyncExitStack()
        self.network = MemoryNetwork(self.random("network"), config=config.link, shape_of=self._shape_of)
        self.service = DirectoryService(ServiceConfig(instance=f"world-{config.seed}"), self._clock)
        self.nodes: dict[str, Node] = {}
        self.backends: dict[str, StageBackend] = {}
        self.swarms: dict[str, Swarm] = {}
        self._mortals: dict[str, tuple[_MortalTransport, _MemberDirectory]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, directory in self._mortals.values():
            directory.deaf = True
        try:
            await self._drivers.aclose()
        finally:
            async with asyncio.TaskGroup() as group:
                for node in self.nodes.values():
                    group.create_task(node.drain())
            for backend in self.backends.values():
                await backend.aclose()

    def random(self, purpose: str) -> Random:
        """A source of its own for each purpose: what one draws changes nothing for the others."""
        return Random(self._seed(purpose))  # noqa: S311 - a simulation is to be repeated

    def node_id(self, name: str) -> NodeId:
        """Of a member. Raises UsageError where nobody has that name."""
        found = self._ids.get(name)
        if found is None:
            raise UsageError(f"nobody here is called {name!r}", hint=f"known: {', '.join([*self._ids][:8])}, ...")
        return found

    async def add_nodes(self, members: Sequence[tuple[str, StageBackend, NodeConfig, Access]]) -> None:
        """Many nodes that start at once, which spares each the news of all others one by one. As ``add_node``."""
        async with asyncio.TaskGroup() as group:
            for member in members:
                group.create_task(self.add_node(*member))

    async def add_node(self, name: str, backend: StageBackend, config: NodeConfig, access: Access) -> Node:
        """One more node, announced when this returns. Raises as ``Node.start``."""
        identity, transport = self._member(name, access)
        ports = NodePorts(
            identity=identity,
            transport=transport,
            directory=self._directory(name),
            backend=backend,
            clock=self._clock,
            random=self.random(f"node {name}"),
        )
        node = Node(replace(config, listen=f"{name}:1"), ports)
        self.nodes[name], self.backends[name] = node, backend
        await node.start()
        return node

    async def add_driver(self, name: str, spec: ModelSpec, access: Access) -> Swarm:
        """One more driver of that model, without a tokenizer. Raises as ``Swarm``."""
        identity, transport = self._member(name, access)
        ports = DriverPorts(
            identity=identity,
            transport=transport,
            directory=self._directory(name),
            clock=self._clock,
            random_bytes=self.random(f"ids of {name}").randbytes,
        )
        swarm = self.swarms[name] = Swarm(spec, None, ports)
        return await self._drivers.enter_async_context(swarm)

    def crash(self, name: str) -> None:
        """A member's process is gone: its links are reset, nothing of it is heard again, its record ends with its time."""
        self.network.crash(self.node_id(name))
        transport, directory = self._mortals[name]
        transport.dead = True
        directory.reached.reachable = False

    def _member(self, name: str, access: Access) -> tuple[Identity, Transport]:
        if name in self._ids:
            raise UsageError(f"two members are called {name!r}", hint="give each node and driver a name of its own")
        identity = Identity(Ed25519PrivateKey.from_private_bytes(self._digest(f"key {name}")))
        self._ids[name], self._access[identity.node_id] = identity.node_id, access
        transport = _MortalTransport(self.network.endpoint(identity.node_id, uplink_bytes_per_s=access.up_bytes_per_s))
        reached = MemoryDirectory(self.service, self.random(f"directory of {name}"))
        self._mortals[name] = transport, _MemberDirectory(reached)
        return identity, self._config.wrap_transport(transport)

    def _directory(self, name: str) -> Directory:
        return self._config.wrap_directory(name, self._mortals[name][1])

    def _shape_of(self, sender: NodeId, receiver: NodeId) -> LinkShape:
        return path_shape(self._access[sender], self._access[receiver])

    def _digest(self, purpose: str) -> bytes:
        return blake3(f"{self._config.seed} {purpose}".encode()).digest()

    def _seed(self, purpose: str) -> int:
        return int.from_bytes(self._digest(purpose)[:8], "little")


class _MortalTransport:
    """See ``Transport``. Once ``dead`` it dials no more: what is left of a crashed process must reach nobody."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.dead = False

    @property
    def node_id(self) -> NodeId:
        return self._inner.node_id

    async def dial(self, peer: NodeId, addresses: Sequence[str]) -> Link:
        if self.dead:
            raise Unreachable("this process has crashed")
        return await self._inner.dial(peer, addresses)

    async def listen(self, address: str, on_link: Callable[[Link], None]) -> Listener:
        return await self._inner.listen(address, on_link)

    async def close(self) -> None:
        await self._inner.close()


class _MemberDirectory:
    """See ``Directory``. Once ``deaf`` it takes no more announcements, and says so to nobody."""

    def __init__(self, reached: MemoryDirectory) -> None:
        self.reached = reached
        self.deaf = False

    async def announce(self, signed: SignedRecord) -> None:
        if not self.deaf:
            await self.reached.announce(signed)

    async def withdraw(self, signed: SignedWithdrawal) -> None:
        if not self.deaf:
            await self.reached.withdraw(signed)

    async def records(self, query: Query = EVERYTHING) -> list[NodeRecord]:
        return await self.reached.records(query)

    def watch(self, query: Query = EVERYTHING) -> AsyncGenerator[Change, None]:
        return self.reached.watch(query)

    async def report_links(self, signed: SignedLinks) -> None:
        if not self.deaf:
            await self.reached.report_links(signed)

    async def links(self) -> list[MeasuredLink]:
        return await self.reached.links()

    async def aclose(self) -> None:
        await self.reached.aclose()

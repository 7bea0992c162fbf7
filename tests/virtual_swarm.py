"""A whole swarm - directory, nodes, a driver - in one process over memory links, for any event loop.

The code is the one that serves: only the ports differ (memory instead of TLS and HTTP, compute on the loop instead of a
thread). Keys, session ids and jitter come from a seed, so that two runs on the virtual clock are the same run.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from farflung.core.errors import FarflungError
from farflung.core.ids import NodeId
from farflung.core.messages import Hello
from farflung.core.model import LayerRange, ModelSpec
from farflung.engine.backend import StageBackend
from farflung.engine.loader import load_stage
from farflung.engine.open_model import open_source
from farflung.engine.torch_backend import BackendConfig, TorchBackend
from farflung.identity.keys import Identity
from farflung.node.service import Node, NodeConfig, NodePorts
from farflung.session.swarm import DriverPorts, Swarm
from farflung.swarm.memory_directory import MemoryDirectory
from farflung.swarm.service import DirectoryService, ServiceConfig
from farflung.transport.hello import hello_with
from farflung.transport.link import Frame, Link, LinkHandler, LinkStats, Listener, Priority, Transport
from farflung.transport.memory import LinkShape, MemoryNetwork
from farflung.wire.codec import CODEC_NAMES

START_UNIX_S = 1_700_000_000.0


def seeded_identity(number: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


@dataclass(frozen=True)
class Recorded:
    """A frame as its receiver saw it."""

    time_s: float
    sender: NodeId
    receiver: NodeId
    channel: int
    message: object
    sizes: tuple[int, ...]


class RecordingTransport:
    """Passes everything on and writes down each frame that arrives."""

    def __init__(self, inner: Transport, log: list[Recorded]) -> None:
        self._inner = inner
        self._log = log

    @property
    def node_id(self) -> NodeId:
        return self._inner.node_id

    async def dial(self, peer: NodeId, addresses: Sequence[str]) -> Link:
        return RecordingLink(await self._inner.dial(peer, addresses), self.node_id, self._log)

    async def listen(self, address: str, on_link: Callable[[Link], None]) -> Listener:
        return await self._inner.listen(address, lambda link: on_link(RecordingLink(link, self.node_id, self._log)))

    async def close(self) -> None:
        await self._inner.close()


class RecordingLink:
    def __init__(self, inner: Link, me: NodeId, log: list[Recorded]) -> None:
        self._inner = inner
        self._me = me
        self._log = log

    @property
    def peer(self) -> NodeId:
        return self._inner.peer

    @property
    def peer_hello(self) -> Hello | None:
        return self._inner.peer_hello

    @property
    def stats(self) -> LinkStats:
        return self._inner.stats

    @property
    def is_up(self) -> bool:
        return self._inner.is_up

    def start(self, handler: LinkHandler) -> None:
        self._handler = handler
        self._inner.start(self)

    def new_channel(self) -> int:
        return self._inner.new_channel()

    def send(self, channel: int, frame: Frame, priority: Priority) -> int:
        return self._inner.send(channel, frame, priority)

    async def close(self, error: FarflungError | None = None) -> None:
        await self._inner.close(error)

    def end(self, error: FarflungError) -> None:
        self._inner.end(error)

    def idle_frame(self) -> None:
        self._inner.idle_frame()

    def on_frame(self, link: Link, channel: int, frame: Frame) -> None:
        now_s = asyncio.get_running_loop().time()
        sizes = tuple(len(buffer) for buffer in frame.buffers)
        self._log.append(Recorded(now_s, link.peer, self._me, channel, frame.message, sizes))
        self._handler.on_frame(self, channel, frame)

    def on_lost(self, link: Link, error: FarflungError) -> None:
        self._handler.on_lost(self, error)


@dataclass
class World:
    """What a test may look at and break."""

    network: MemoryNetwork
    nodes: list[Node]
    backends: list[TorchBackend]
    swarm: Swarm
    spec: ModelSpec
    service: DirectoryService
    log: list[Recorded] = field(default_factory=list)

    @property
    def driver_id(self) -> NodeId:
        return seeded_identity(200).node_id

    def kv_in_use(self) -> list[int]:
        return [backend.kv_tokens - backend.kv_free_tokens for backend in self.backends]

    async def settle(self, timeout_s: float = 3.0) -> None:
        """Waits until no node has a session, then demands that no lease is left. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            for node in self.nodes:
                await node.table.empty.wait()
        assert self.kv_in_use() == [0] * len(self.backends)


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    model: Path
    cuts: tuple[int, ...]
    seed: int = 1
    replicas: int = 1
    shape: LinkShape = field(default_factory=lambda: LinkShape(delay_s=0.01, jitter_s=0.002, rate_bytes_per_s=12.5e6))
    kv_tokens: int = 256
    dtype: torch.dtype = torch.float32
    node: NodeConfig = field(default_factory=NodeConfig)
    wrap: Callable[[StageBackend], StageBackend] = lambda backend: backend
    codecs: tuple[tuple[str, ...], ...] = ()
    """What each stage speaks; empty: everything."""


@asynccontextmanager
async def world(config: WorldConfig) -> AsyncGenerator[World, None]:
    """A swarm whose stages begin at layer 0 and at each of ``cuts``, each served by ``replicas`` nodes."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()

    def clock() -> float:
        return START_UNIX_S + loop.time() - began_s

    source = open_source(str(config.model))
    spec = source.spec()
    network = MemoryNetwork(random.Random(config.seed), shape=config.shape)
    service = DirectoryService(ServiceConfig(instance="test"), clock)
    log: list[Recorded] = []
    bounds = (0, *config.cuts, spec.layers)
    nodes, backends = [], []
    async with AsyncExitStack() as stack:
        ranges = [*pairwise(bounds)] * config.replicas
        for number, (start, stop) in enumerate(ranges, start=1):
            backend = TorchBackend(
                load_stage(source, LayerRange(start, stop), config.dtype),
                spec,
                BackendConfig(kv_tokens=config.kv_tokens, threads=1, inline=True, pack=False),
            )
            stack.push_async_callback(backend.aclose)
            identity = seeded_identity(number)
            codecs = config.codecs[number - 1] if config.codecs else CODEC_NAMES
            ports = NodePorts(
                identity=identity,
                transport=RecordingTransport(network.endpoint(identity.node_id, hello=hello_with(codecs)), log),
                directory=MemoryDirectory(service, random.Random(config.seed + number)),
                backend=config.wrap(backend),
                clock=clock,
                random=random.Random(config.seed * 1000 + number),
            )
            table = replace(config.node.table, codecs=frozenset(codecs))
            node = Node(replace(config.node, listen=f"node{number}:1", table=table), ports)
            await node.start()
            stack.push_async_callback(node.drain)
            nodes.append(node)
            backends.append(backend)
        driver = seeded_identity(200)
        ids = random.Random(config.seed)
        swarm = Swarm(
            spec,
            None,
            DriverPorts(
                identity=driver,
                transport=RecordingTransport(network.endpoint(driver.node_id), log),
                directory=MemoryDirectory(service, random.Random(config.seed + 100)),
                clock=clock,
                random_bytes=ids.randbytes,
            ),
        )
        await stack.enter_async_context(swarm)
        yield World(network, nodes, backends, swarm, spec, service, log)

"""Places where links can be tried: one contract, three worlds. And handlers that write down what they are told."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from farflung.core.errors import FarflungError
from farflung.core.ids import NodeId
from farflung.core.messages import Credit, Hello
from farflung.identity import Identity, SwarmKey
from farflung.lab.virtual_clock import run_virtual
from farflung.transport.dialling import OnRefused
from farflung.transport.gate import GateConfig
from farflung.transport.hello import HELLO
from farflung.transport.link import Frame, Link, LinkConfig, Listener, Priority, Transport
from farflung.transport.memory import LinkShape, MemoryNetwork
from farflung.transport.tcp import TcpTransport


class Waiting:
    """Something whose changes can be waited for."""

    def __init__(self) -> None:
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    async def until(self, condition: Callable[[], bool]) -> None:
        if not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append((condition, waiter))
            async with asyncio.timeout(20):
                await waiter

    def wake(self) -> None:
        for condition, waiter in self._waiters:
            if not waiter.done() and condition():
                waiter.set_result(None)


class Recorder(Waiting):
    """A handler that writes down what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[tuple[int, Frame]] = []
        self.lost: list[FarflungError] = []

    def on_frame(self, link: Link, channel: int, frame: Frame) -> None:
        assert not self.lost, "a frame after the end"
        self.frames.append((channel, frame))
        self.wake()

    def on_lost(self, link: Link, error: FarflungError) -> None:
        assert not link.is_up
        self.lost.append(error)
        self.wake()

    def numbers(self, channel: int) -> list[int]:
        """The numbers of ``numbered`` frames of one channel, in order."""
        return [frame.message.bytes for at, frame in self.frames if at == channel and isinstance(frame.message, Credit)]

    async def until_frames(self, count: int) -> None:
        await self.until(lambda: len(self.frames) >= count)

    async def until_lost(self) -> FarflungError:
        await self.until(lambda: bool(self.lost))
        return self.lost[0]


class Node(Waiting):
    """A transport that may listen, and starts every link it accepts with a recorder of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.transport: Transport
        self.accepted: list[tuple[Link, Recorder]] = []
        self.refused: list[FarflungError] = []
        self.listener: Listener | None = None

    @property
    def node_id(self) -> NodeId:
        return self.transport.node_id

    @property
    def address(self) -> str:
        assert self.listener is not None
        return self.listener.address

    def on_link(self, link: Link) -> None:
        recorder = Recorder()
        self.accepted.append((link, recorder))
        link.start(recorder)
        self.wake()

    def on_refused(self, where: str, error: FarflungError) -> None:
        self.refused.append(error)
        self.wake()

    async def first_link(self) -> tuple[Link, Recorder]:
        await self.until(lambda: bool(self.accepted))
        return self.accepted[0]

    async def refusal(self) -> FarflungError:
        """The first thing the listener refused."""
        await self.until(lambda: bool(self.refused))
        return self.refused[0]


class World(Protocol):
    """A network with nodes, and a way to run a scenario in it."""

    def run(self, scenario: Callable[[World], Awaitable[None]], config: LinkConfig | None = None) -> None:
        """Runs it, then checks that nothing is left: no task, no unclosed socket, no word of asyncio in the log."""

    def node(self, hello: Hello = HELLO, swarm_key: SwarmKey | None = None) -> Node: ...

    async def listening(self, hello: Hello = HELLO, swarm_key: SwarmKey | None = None) -> Node:
        """A node that listens."""

    def die(self, node: Node) -> None:
        """What a killed process does to its links."""


class _World:
    def __init__(self) -> None:
        self.config = LinkConfig()
        self._nodes: list[Node] = []

    def run(self, scenario: Callable[[Any], Awaitable[None]], config: LinkConfig | None = None) -> None:
        self.config = config or LinkConfig()
        logged: list[str] = []
        watch = logging.Handler()
        watch.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("asyncio").addHandler(watch)
        try:
            self.run_coroutine(self._whole(scenario))
        finally:
            gc.collect()
            logging.getLogger("asyncio").removeHandler(watch)
        assert not logged, logged

    def run_coroutine(self, coroutine: Any) -> None:
        asyncio.run(coroutine)

    async def _whole(self, scenario: Callable[[Any], Awaitable[None]]) -> None:
        self.prepare()
        try:
            await scenario(self)
        finally:
            await asyncio.gather(*(node.transport.close() for node in self._nodes))
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, asyncio.all_tasks()

    def prepare(self) -> None: ...

    def node(self, hello: Hello = HELLO, swarm_key: SwarmKey | None = None) -> Node:
        node = Node()
        node.transport = self.transport(hello, swarm_key, node.on_refused)
        self._nodes.append(node)
        return node

    async def listening(self, hello: Hello = HELLO, swarm_key: SwarmKey | None = None) -> Node:
        node = self.node(hello, swarm_key)
        node.listener = await node.transport.listen("127.0.0.1:0", node.on_link)
        return node

    def transport(self, hello: Hello, swarm_key: SwarmKey | None, on_refused: OnRefused) -> Transport:
        raise NotImplementedError


class TcpWorld(_World):
    """Sockets over loopback."""

    def __init__(self, gate: GateConfig | None = None) -> None:
        super().__init__()
        self._gate = gate

    def transport(self, hello: Hello, swarm_key: SwarmKey | None, on_refused: OnRefused) -> Transport:
        return TcpTransport(
            Identity.generate(), self.config, hello=hello, swarm_key=swarm_key, gate=self._gate, on_refused=on_refused
        )

    def die(self, node: Node) -> None:
        assert isinstance(node.transport, TcpTransport)
        for connection in list(node.transport._setup.connections):
            connection.abort()


class MemoryWorld(_World):
    """A memory network on the real clock."""

    def prepare(self) -> None:
        shape = LinkShape(delay_s=0.002, jitter_s=0.001, rate_bytes_per_s=2e8)
        self.network = MemoryNetwork(random.Random(1), config=self.config, shape=shape)
        self._names = 0

    def transport(self, hello: Hello, swarm_key: SwarmKey | None, on_refused: OnRefused) -> Transport:
        self._names += 1
        return self.network.endpoint(NodeId(f"{self._names:064x}"), hello=hello, swarm_key=swarm_key, on_refused=on_refused)

    def die(self, node: Node) -> None:
        self.network.crash(node.node_id)


class VirtualWorld(MemoryWorld):
    """A memory network on the virtual clock, with a slow and lossy path."""

    def prepare(self) -> None:
        shape = LinkShape(delay_s=0.05, jitter_s=0.02, rate_bytes_per_s=5e6, loss=0.01)
        self.network = MemoryNetwork(random.Random(1), config=self.config, shape=shape)
        self._names = 0

    def run_coroutine(self, coroutine: Any) -> None:
        run_virtual(coroutine)


def numbered(number: int, buffers: Sequence[bytes] = ()) -> Frame:
    return Frame(Credit(number), buffers)


async def linked(world: World) -> tuple[Link, Recorder, Link, Recorder]:
    """Two nodes with a link between them: the dialling end and its recorder, the other end and its recorder."""
    here, there = world.node(), await world.listening()
    link = await here.transport.dial(there.node_id, [there.address])
    recorder = Recorder()
    link.start(recorder)
    back, back_recorder = await there.first_link()
    return link, recorder, back, back_recorder


WORLDS: dict[str, Callable[[], Any]] = {"tcp": TcpWorld, "memory": MemoryWorld, "virtual": VirtualWorld}
__all__ = ["WORLDS", "MemoryWorld", "Node", "Priority", "Recorder", "TcpWorld", "VirtualWorld", "World", "linked", "numbered"]

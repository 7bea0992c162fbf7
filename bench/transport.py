"""How fast links are on this machine, between real processes over loopback.

    python -m bench.transport [--json] [--repeat 2000]

Rows, each the median over its repetitions with the 95th percentile:

- ``tcp, plain``: 8 KB there and back over asyncio alone, without TLS, frames or priorities. The yardstick.
- ``link``: the same through ``TcpTransport``: TLS 1.3, frames, fragments, the shared uplink.
- ``link, beside bulk``: the same while 16 MB frames fill the link.
- ``ring of 4``: 8 KB from the driver through three nodes and back, four hops between four processes.
- ``bulk``: 1 MiB frames one way.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from farflung.core.errors import FarflungError
from farflung.core.ids import NodeId
from farflung.core.messages import Credit
from farflung.identity import Identity
from farflung.transport.link import Frame, Link, Priority
from farflung.transport.tcp import TcpTransport

ROW_BYTES = 8192
BULK_FRAME_BYTES = 1024**2
BULK_FRAMES = 512
ECHO, SINK = 1, 0  # Credit.bytes says what the node shall do with a frame


class Node:
    """Sends each frame on: to the next node, or back where it came from. Frames for the sink end here, but for the last."""

    onward: Link | None = None

    def on_frame(self, link: Link, channel: int, frame: Frame) -> None:
        assert isinstance(frame.message, Credit)
        if frame.message.bytes == SINK and frame.buffers:
            return
        (self.onward or link).send(channel, frame, Priority.DECODE)

    def on_lost(self, link: Link, error: FarflungError) -> None:
        pass


class Driver:
    """Waits for frames one at a time."""

    def __init__(self) -> None:
        self.arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_frame(self, link: Link, channel: int, frame: Frame) -> None:
        self.arrived.set_result(None)

    def on_lost(self, link: Link, error: FarflungError) -> None:
        if not self.arrived.done():
            self.arrived.set_exception(error)

    async def exchange(self, send: Callable[[], object]) -> None:
        self.arrived = asyncio.get_running_loop().create_future()
        send()
        await self.arrived


class PlainEcho(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert isinstance(self.transport, asyncio.WriteTransport)
        self.transport.write(data)


class PlainClient(asyncio.Protocol):
    missing = 0
    arrived: asyncio.Future[None]

    def data_received(self, data: bytes) -> None:
        self.missing -= len(data)
        if self.missing == 0:
            self.arrived.set_result(None)


@dataclass(frozen=True)
class NodeProcess:
    node_id: NodeId
    address: str
    plain_port: int


async def serve() -> None:
    """The child: tells where it listens, reads who comes next, serves until its input ends."""
    loop = asyncio.get_running_loop()
    transport = TcpTransport(Identity.generate())
    node = Node()
    listener = await transport.listen("127.0.0.1:0", lambda link: link.start(node))
    plain = await loop.create_server(PlainEcho, "127.0.0.1", 0)
    print(json.dumps([transport.node_id, listener.address, plain.sockets[0].getsockname()[1]]), flush=True)
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    onward = json.loads(await lines.readline())
    if onward:
        node.onward = await transport.dial(onward[0], [onward[1]])
        node.onward.start(node)
    print("ready", flush=True)
    await lines.read()
    plain.close()
    await transport.close()


@contextlib.asynccontextmanager
async def nodes(transport: TcpTransport, count: int, back_to: str | None) -> AsyncIterator[tuple[list[NodeProcess], Link]]:
    """``count`` node processes in a row and our link to the first; the last one sends to ``back_to``, which is ours."""
    pipe = asyncio.subprocess.PIPE
    children = [
        await asyncio.create_subprocess_exec(sys.executable, "-m", "bench.transport", "--node", stdin=pipe, stdout=pipe)
        for _ in range(count)
    ]
    try:
        found = [NodeProcess(*json.loads(await child.stdout.readline())) for child in children if child.stdout]
        link = await transport.dial(found[0].node_id, [found[0].address])
        for index in range(count):
            onward = [found[index + 1].node_id, found[index + 1].address] if index + 1 < count else None
            if onward is None and back_to is not None:
                onward = [transport.node_id, back_to]
            stdin = children[index].stdin
            assert stdin is not None
            stdin.write(json.dumps(onward).encode() + b"\n")
        for child in children:
            assert child.stdout is not None
            await child.stdout.readline()
        yield found, link
    finally:
        for child in children:
            if child.stdin is not None:
                child.stdin.close()
        await asyncio.gather(*(child.wait() for child in children))


async def timed(once: Callable[[], Awaitable[None]], repeat: int) -> dict[str, float]:
    for _ in range(repeat // 10 + 1):
        await once()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        await once()
        times.append(time.perf_counter() - start)
    return {"median_ms": statistics.median(times) * 1e3, "p95_ms": statistics.quantiles(times, n=20)[-1] * 1e3}


async def plain(port: int, repeat: int) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    transport, client = await loop.create_connection(PlainClient, "127.0.0.1", port)
    row = os.urandom(ROW_BYTES)

    async def once() -> None:
        client.missing, client.arrived = len(row), loop.create_future()
        transport.write(row)
        await client.arrived

    result = await timed(once, repeat)
    transport.close()
    return result


async def bulk(driver: Driver, link: Link) -> float:
    """MB/s."""
    channel, block = link.new_channel(), os.urandom(BULK_FRAME_BYTES)
    start = time.perf_counter()
    for _ in range(4):
        for _ in range(BULK_FRAMES // 4):
            link.send(channel, Frame(Credit(SINK), [block]), Priority.BULK)
        await driver.exchange(lambda: link.send(channel, Frame(Credit(SINK)), Priority.BULK))
    return BULK_FRAMES * BULK_FRAME_BYTES / (time.perf_counter() - start) / 1e6


async def beside_bulk(driver: Driver, link: Link, once: Callable[[], Awaitable[None]], repeat: int) -> dict[str, float]:
    channel, block = link.new_channel(), os.urandom(16 * BULK_FRAME_BYTES)
    sent = 0

    async def busy_once() -> None:
        nonlocal sent
        while sent < link.stats.bytes_sent + 3 * len(block):  # keeps the queue filled
            link.send(channel, Frame(Credit(SINK), [block]), Priority.BULK)
            sent += len(block)
        await once()

    sent = link.stats.bytes_sent
    return await timed(busy_once, repeat)


async def measure(repeat: int) -> list[dict[str, object]]:
    row = os.urandom(ROW_BYTES)
    rows: list[dict[str, object]] = []
    transport, driver = TcpTransport(Identity.generate()), Driver()
    async with nodes(transport, 1, None) as (found, link):
        link.start(driver)
        channel = link.new_channel()
        once = lambda: driver.exchange(lambda: link.send(channel, Frame(Credit(ECHO), [row]), Priority.DECODE))  # noqa: E731
        rows.append({"what": "tcp, plain", **await plain(found[0].plain_port, repeat)})
        rows.append({"what": "link", **await timed(once, repeat)})
        rows.append({"what": "bulk", "mb_per_s": await bulk(driver, link)})
        rows.append({"what": "link, beside bulk", **await beside_bulk(driver, link, once, repeat // 5)})
        await link.close()
    listener = await transport.listen("127.0.0.1:0", lambda link: link.start(driver))
    async with nodes(transport, 3, listener.address) as (_, first):
        first.start(driver)
        channel = first.new_channel()
        once = lambda: driver.exchange(lambda: first.send(channel, Frame(Credit(ECHO), [row]), Priority.DECODE))  # noqa: E731
        rows.append({"what": "ring of 4", **await timed(once, repeat)})
        await transport.close()
    yardstick = rows[0]["median_ms"]
    for each in rows:
        if "median_ms" in each:
            each["ratio"] = each["median_ms"] / yardstick  # type: ignore[operator]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.transport", description="how fast links are on this machine")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--repeat", type=int, default=2000)
    parser.add_argument("--node", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node:
        asyncio.run(serve())
        return
    rows = asyncio.run(measure(options.repeat))
    if options.json:
        print(json.dumps({"row_bytes": ROW_BYTES, "rows": rows}))
        return
    print(f"{ROW_BYTES} bytes there and back, {options.repeat} times\n")
    print(f"{'what':20} {'median ms':>10} {'p95 ms':>8} {'of plain':>9} {'MB/s':>7}")
    for each in rows:
        cells = [f"{each[key]:.3f}" if key in each else "" for key in ("median_ms", "p95_ms")]
        ratio = f"{each['ratio']:.2f}" if "ratio" in each else ""
        rate = f"{each['mb_per_s']:.0f}" if "mb_per_s" in each else ""
        print(f"{each['what']:20} {cells[0]:>10} {cells[1]:>8} {ratio:>9} {rate:>7}")


if __name__ == "__main__":
    main()

"""What strangers cost an honest session: its time between tokens under each attack beside that alone, in one run.

    python -m bench.hostile [--model gemma3-270m] [--stages 3] [--tokens 64] [--rounds 3] [--attacks a,b] [--json]

Real node processes (bf16, one compute thread each, int8 rows) over loopback TLS. Each attack is a process of its own, on a core
of its own where there are several, from another address (127.0.0.2) than the honest driver; it goes at all nodes at once, as
fast as it can unless it says otherwise. What it costs the machine by itself is not the nodes' fault, so a turn has three parts,
a session each: alone, beside a process that only burns the attacker's core, and under attack. Ratios compare the last two
(medians over the turns). ``node_cpu`` is what a node spent on the stranger, in seconds per second. Target: p95 rises by at most
a quarter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from psutil import Process

    from farflung.core.messages import Message
    from farflung.session import Swarm

PROMPT = list(range(1000, 1032))
READY_S = 600.0
STRANGER = "127.0.0.2"
NOTHING = "nothing"
TARGET = 1.25


def on_wire(message: Message, channel: int = 0, buffer: bytes = b"") -> bytes:
    from farflung.wire.fragment import fragments
    from farflung.wire.frame import encode_frame

    parts = encode_frame(message, (buffer,) if buffer else ())
    return b"".join(b"".join(fragment) for fragment in fragments(channel, 0, parts))


def client() -> ssl.SSLContext:
    from farflung.identity import Identity, client_context

    return client_context(Identity.generate())


async def link(host: str, port: int, context: ssl.SSLContext) -> asyncio.StreamWriter:
    """A link of a stranger that has said hello; what comes back is thrown away."""
    from farflung.transport.hello import HELLO

    reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname="", local_addr=(STRANGER, 0))
    writer.write(on_wire(HELLO))
    reader.feed_data = lambda data: None  # type: ignore[method-assign]
    return writer


async def flood(host: str, port: int, piece: Callable[[int], bytes], pieces: int = 64) -> None:
    """Sends pieces without end, over a new link under a new key wherever the last one was ended."""
    number = 0
    while True:
        with suppress(OSError, ssl.SSLError):
            writer = await link(host, port, client())
            try:
                while not writer.is_closing():
                    writer.write(b"".join(piece(number + more) for more in range(pieces)))
                    number += pieces
                    await writer.drain()
                    await asyncio.sleep(0)
            finally:
                writer.transport.abort()
        await asyncio.sleep(0.01)


async def half_open(host: str, port: int) -> None:
    """700 sockets held to each node, half of them in the middle of a handshake, 1,000 new ones a second."""
    from farflung.transport.tls import TlsStream

    stream = TlsStream(client(), server_side=False)
    stream.shake_hands()
    greeting, held = stream.take_outgoing(), []
    while True:
        for number in range(10):
            sock = socket.socket()
            sock.setblocking(False)
            sock.bind((STRANGER, 0))
            with suppress(OSError):
                async with asyncio.timeout(1.0):
                    await asyncio.get_running_loop().sock_connect(sock, (host, port))
                if number % 2:
                    sock.send(greeting)
            held.append(sock)
        while len(held) > 700:
            held.pop(0).close()
        await asyncio.sleep(0.01)


async def slow_reader(host: str, port: int) -> None:
    """Asks for 2,000 refusals on each link and reads none of them; shows life."""
    from farflung.core.ids import SessionId
    from farflung.core.messages import Attach, Ping

    while True:
        with suppress(OSError, ssl.SSLError):
            writer = await link(host, port, client())
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            for number in range(2000):
                writer.write(on_wire(Attach(SessionId(f"{number:032x}")), 2 * number + 2))
            while not writer.is_closing():
                writer.write(on_wire(Ping(1)))
                await asyncio.sleep(0.5)
        await asyncio.sleep(0.5)


async def openings(host: str, port: int) -> None:
    """Openings whose signature is wrong."""
    from farflung.core.messages import Open

    text = opening_text()
    await flood(host, port, lambda number: on_wire(Open(text, bytes(64), codec="int8"), 2 * (number % 100_000) + 2))


def opening_text() -> bytes:
    from farflung.core.ids import ModelDigest, NodeId, SessionId
    from farflung.core.messages import OpenText
    from farflung.core.model import LayerRange
    from farflung.core.route import Hop, Route
    from farflung.core.sampling import SamplingOptions
    from farflung.identity import Identity
    from farflung.protocol.opening import encode_open_text

    text = OpenText(
        session=SessionId("1" * 32),
        owner=Identity.generate().node_id,
        route=Route((Hop(NodeId("2" * 64), LayerRange(0, 6)),)),
        lease_tokens=16,
        lease_s=60.0,
        expires_unix_s=time.time() + 300,
        digest=ModelDigest("3" * 64),
        codecs=("int8",),
        sampling=SamplingOptions(),
        prompt_tokens=2,
        max_tokens=4,
    )
    return encode_open_text(text)


async def strays(host: str, port: int) -> None:
    """Windows for somebody else's session."""
    from farflung.core.messages import Window
    from farflung.core.window import SlotRun, SlotSpan

    frame = on_wire(Window(1, (SlotRun(5, 1, 4),), (SlotSpan(5, 1),)), 2, bytes(4))
    await flood(host, port, lambda number: frame)


async def pings(host: str, port: int) -> None:
    """Pings without end."""
    from farflung.core.messages import Ping

    await flood(host, port, lambda number: on_wire(Ping(number)))


async def garbage(host: str, port: int) -> None:
    """Bytes that are no frames, after a good handshake."""
    junk = os.urandom(16384)
    await flood(host, port, lambda number: junk, pieces=1)


async def nothing(host: str, port: int) -> None:
    """Talks to nobody."""
    while True:
        until = time.perf_counter() + 0.01
        while time.perf_counter() < until:
            pass
        await asyncio.sleep(0)


ATTACKS: dict[str, Callable[[str, int], Awaitable[None]]] = {
    NOTHING: nothing,
    "half_open": half_open,
    "slow_reader": slow_reader,
    "openings": openings,
    "strays": strays,
    "pings": pings,
    "garbage": garbage,
}


def own_cores(*, all_of_them: bool = False) -> list[int]:
    """Cores that may be used; none where this system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return list(range(os.cpu_count() or 1)) if all_of_them else sorted(os.sched_getaffinity(0))


async def attack(name: str, addresses: list[str]) -> None:
    """The child: attacks until its stdin closes."""
    logging.disable()  # asyncio's words about links that the node has ended
    if cores := own_cores(all_of_them=True):
        os.sched_setaffinity(0, cores[-1:])
    targets = [(host, int(port)) for host, port in (address.rsplit(":", 1) for address in addresses)]
    tasks = [asyncio.ensure_future(ATTACKS[name](host, port)) for host, port in targets]
    print("attacking", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def gaps_ms(swarm: Swarm, tokens: int) -> list[float]:
    from farflung.session import GenerateOptions

    times: list[float] = []
    loop = asyncio.get_running_loop()
    async for token in swarm.generate(PROMPT, GenerateOptions(max_tokens=tokens, codecs=("int8",), ignore_eos=True)):
        if token.id is not None:
            times.append(loop.time())
    return [(after - before) * 1e3 for before, after in pairwise(times)]


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


class Turn(NamedTuple):
    """Times between tokens, and the time that the busiest node computed for each token and in all per second."""

    gaps_ms: list[float]
    cpu_s: float
    took_s: float


async def watched(nodes: list[Process], run: Awaitable[list[float]]) -> Turn:
    def cpu_s() -> list[float]:
        return [node.cpu_times().user + node.cpu_times().system for node in nodes]

    before, began = cpu_s(), time.perf_counter()
    gaps = await run
    spent = [after - earlier for after, earlier in zip(cpu_s(), before, strict=True)]
    return Turn(gaps, max(spent), time.perf_counter() - began)


class Parts(NamedTuple):
    alone: Turn
    beside: Turn
    attacked: Turn


def compared(turns: list[Parts]) -> dict[str, Any]:
    def over_turns(figure: Callable[[Parts], float]) -> float:
        return statistics.median(map(figure, turns))

    def ratio(figure: Callable[[list[float]], float]) -> float:
        return over_turns(lambda parts: figure(parts.attacked.gaps_ms) / figure(parts.beside.gaps_ms))

    def of_gaps(figure: Callable[[list[float]], float]) -> dict[str, float]:
        return {
            "alone": over_turns(lambda parts: figure(parts.alone.gaps_ms)),
            "beside": over_turns(lambda parts: figure(parts.beside.gaps_ms)),
            "attacked": over_turns(lambda parts: figure(parts.attacked.gaps_ms)),
        }

    return {
        "p50_ms": of_gaps(statistics.median),
        "p95_ms": of_gaps(p95),
        "p50_ratio": ratio(statistics.median),
        "p95_ratio": ratio(p95),
        "node_cpu": over_turns(lambda parts: (parts.attacked.cpu_s - parts.beside.cpu_s) / parts.attacked.took_s),
    }


async def under_attack(name: str, addresses: list[str], nodes: list[Process], swarm: Swarm, tokens: int) -> Turn:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.hostile", "--attack", name, *addresses), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        await child.stdout.readline()  # type: ignore[union-attr]
        await asyncio.sleep(1.0)  # it is under way
        return await watched(nodes, gaps_ms(swarm, tokens))
    finally:
        await child.communicate(b"")


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import psutil

    from farflung.cli.processes import processes
    from farflung.session import Swarm

    async with processes() as group:
        directory = await group.start(
            "directory", ["farflung", "directory", "--listen", "127.0.0.1:0", "--json", "--exit-with-stdin"]
        )
        url = (await directory.event(READY_S))["url"]
        common = ["farflung", "node", "--directory", url, "--model", arguments.model, "--dtype", "bf16", "--threads", "1"]
        tail = ["--kv-tokens", "1024", "--driver-share", "0.5", "--ephemeral", "--json", "--exit-with-stdin"]
        nodes, addresses = [], []
        for part in range(1, arguments.stages + 1):
            node = await group.start(f"node {part}", [*common, "--layers", f"{part}/{arguments.stages}", *tail])
            addresses.append((await node.event(READY_S))["listen"])
            nodes.append(psutil.Process(node.pid))
        async with Swarm.connect(url, arguments.model) as swarm:
            await gaps_ms(swarm, 16)
            before = [node.memory_info().rss for node in nodes]
            rows = []
            for name in arguments.attacks:
                turns = []
                for _ in range(arguments.rounds):
                    alone = await watched(nodes, gaps_ms(swarm, arguments.tokens))
                    beside, attacked = [
                        await under_attack(kind, addresses, nodes, swarm, arguments.tokens) for kind in (NOTHING, name)
                    ]
                    turns.append(Parts(alone, beside, attacked))
                grown = max(node.memory_info().rss - rss for node, rss in zip(nodes, before, strict=True))
                rows.append({"attack": name, **compared(turns), "rss_grown_mb": grown / 1e6})
                print(describe(rows[-1]), file=sys.stderr, flush=True)
    return {"model": arguments.model, "stages": arguments.stages, "target_p95_ratio": TARGET, "rows": rows}


def describe(row: dict[str, Any]) -> str:
    def of(parts: dict[str, float]) -> str:
        return " ".join(f"{parts[key]:6.1f}" for key in ("alone", "beside", "attacked"))

    return (
        f"{row['attack']:<12} p50 {of(row['p50_ms'])} ms  {row['p50_ratio']:.2f}   "
        f"p95 {of(row['p95_ms'])} ms  {row['p95_ratio']:.2f}   "
        f"node cpu {row['node_cpu']:+.2f}   memory {row['rss_grown_mb']:+.1f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attacks", type=lambda text: text.split(","), default=[name for name in ATTACKS if name != NOTHING])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--attack", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.attack:
        asyncio.run(attack(arguments.attack[0], arguments.attack[1:]))
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, here and in every child
    cores = own_cores()
    if len(cores) > 1:
        os.sched_setaffinity(0, cores[:-1])  # children inherit it; an attack moves to the last one
    result = asyncio.run(measure(arguments))
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

"""What strangers may send to a tcp listener, and what an honest peer may run into."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import psutil
import pytest
from link_worlds import Node, Recorder, TcpWorld, numbered

from farflung.core.errors import (
    FarflungError,
    FrameTooLarge,
    LinkLost,
    LinkOverloaded,
    MalformedFrame,
    ProtocolViolation,
    Unreachable,
    UsageError,
    WireError,
)
from farflung.core.ids import NodeId
from farflung.core.messages import Fault, Message, Open, Ping, Pong
from farflung.identity import Identity, client_context, server_context
from farflung.transport.address import parse_address
from farflung.transport.frame_link import FrameLink
from farflung.transport.gate import GateConfig
from farflung.transport.hello import HELLO
from farflung.transport.link import Frame, LinkConfig, Priority
from farflung.transport.tcp import TcpListener, TcpTransport
from farflung.transport.tls import TlsStream
from farflung.wire.fragment import fragments
from farflung.wire.frame import encode_frame

QUICK = LinkConfig(handshake_timeout_s=0.4, heartbeat_s=0.1, dead_after_s=0.5)


def on_wire(message: Message, channel: int = 0) -> bytes:
    return b"".join(b"".join(fragment) for fragment in fragments(channel, 0, encode_frame(message)))


@asynccontextmanager
async def raw(node: Node, *, tls: Any = None) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A socket to the node, in TLS where a context is given."""
    host, port = parse_address(node.address)
    reader, writer = await asyncio.open_connection(host, port, ssl=tls, server_hostname="" if tls else None)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


def attack(
    scenario: Callable[[TcpWorld, Node], Awaitable[None]], gate: GateConfig | None = None, config: LinkConfig = QUICK
) -> None:
    """Runs it against a listening node, which must serve an honest peer afterwards."""

    async def whole(world: TcpWorld) -> None:
        victim = await world.listening()
        await scenario(world, victim)
        honest = world.node()
        link = await honest.transport.dial(victim.node_id, [victim.address])
        link.start(Recorder())
        link.send(2, numbered(1), Priority.DECODE)
        _, heard = await victim.first_link()
        await heard.until_frames(1)

    TcpWorld(gate).run(whole, config)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(1000), random.Random(1).randbytes(4096), b"\x16\x03\x01\xff\xff"]
)
def test_garbage_instead_of_tls_is_refused(garbage: bytes) -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        async with raw(victim) as (_, writer):
            writer.write(garbage)
            assert isinstance(await victim.refusal(), LinkLost)

    attack(scenario)


def test_a_handshake_that_stops_half_way_is_refused_in_time() -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        async with raw(victim) as (reader, writer):
            writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
            error = await victim.refusal()
            assert "0.4 s" in str(error)
            with suppress(ConnectionError):
                async with asyncio.timeout(5):
                    assert await reader.read() is not None  # the socket is closed on us

    attack(scenario)


def test_a_peer_without_a_hello_is_refused_in_time() -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        async with raw(victim, tls=client_context(Identity.generate())):
            assert "no hello" in str(await victim.refusal())

    attack(scenario)


def test_a_frame_before_the_hello_breaks_the_protocol() -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        async with raw(victim, tls=client_context(Identity.generate())) as (_, writer):
            writer.write(on_wire(Ping(1), channel=2))
            assert isinstance(await victim.refusal(), ProtocolViolation)

    attack(scenario)


def test_many_unfinished_connections_keep_nobody_out() -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        host, port = parse_address(victim.address)
        held = [await asyncio.open_connection(host, port) for _ in range(12)]
        link = await world.node().transport.dial(victim.node_id, [victim.address])
        assert link.is_up
        assert "oldest" in str(await victim.refusal())
        for _, writer in held:
            writer.transport.abort()
        victim.accepted.clear()

    attack(scenario, GateConfig(greetings=8))


def test_each_connection_that_comes_to_nothing_is_told_of_once() -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        context = client_context(Identity.generate())
        async with raw(victim, tls=context), raw(victim, tls=context), raw(victim, tls=context), raw(victim, tls=context):
            await asyncio.sleep(2 * QUICK.handshake_timeout_s)
        assert ["oldest" in str(error) for error in victim.refused] == [True, True, False, False]

    attack(scenario, GateConfig(greetings=2))


def test_a_connection_that_comes_while_the_listener_closes_keeps_nobody_waiting() -> None:
    async def scenario(world: TcpWorld) -> None:
        for turns in range(4):
            there = await world.listening()
            with socket.create_connection(parse_address(there.address)):
                for _ in range(turns):
                    await asyncio.sleep(0)
                assert there.listener is not None
                async with asyncio.timeout(3):
                    await there.listener.close()
                    await there.transport.close()

    TcpWorld().run(scenario)


AFTER_HELLO = [
    pytest.param(struct.pack("<HBBII", 16, 0b0001, 0, 2, 2**32 - 1) + bytes(12), FrameTooLarge, id="a frame of 4 GB"),
    pytest.param(b"\xff" * 4096, MalformedFrame, id="garbage"),
    pytest.param(on_wire(HELLO), ProtocolViolation, id="a second hello"),
    pytest.param(struct.pack("<HBBII", 8, 0b0011, 0, 2, 4) + b"\x01\x00\x02\x00", WireError, id="a frame that is no frame"),
]


@pytest.mark.parametrize(("bad", "kind"), AFTER_HELLO)
def test_bad_bytes_after_the_hello_end_the_link_with_a_typed_error(bad: bytes, kind: type[FarflungError]) -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        async with raw(victim, tls=client_context(Identity.generate())) as (_, writer):
            writer.write(on_wire(HELLO))
            _, heard = await victim.first_link()
            writer.write(bad)
            assert isinstance(await heard.until_lost(), kind)
        victim.accepted.clear()

    attack(scenario)


@pytest.mark.parametrize("rate", [float("inf"), float("nan"), -1.0, 1e-300])
def test_a_rate_that_cannot_be_measures_nothing_and_harms_nothing(rate: float) -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        async with raw(victim, tls=client_context(Identity.generate())) as (reader, writer):
            writer.write(on_wire(HELLO) + on_wire(Pong(0, rate)))
            link, heard = await victim.first_link()
            link.send(1, numbered(1, [bytes(100_000)]), Priority.DECODE)
            received = 0
            while received < 100_000:
                received += len(await reader.read(65536))
            assert heard.lost == []
            assert link.stats.delivery_bytes_per_s in (None, 1e-300)
        victim.accepted.clear()

    attack(scenario)


def test_a_peer_that_falls_silent_is_lost_with_the_seconds() -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        async with raw(victim, tls=client_context(Identity.generate())) as (_, writer):
            writer.write(on_wire(HELLO))
            _, heard = await victim.first_link()
            error = await heard.until_lost()
            assert isinstance(error, LinkLost)
            assert "silent for 0." in str(error)
        victim.accepted.clear()

    attack(scenario)


def test_a_peer_that_reads_nothing_is_lost_and_not_waited_for() -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        async with raw(victim, tls=client_context(Identity.generate())) as (_, writer):
            writer.write(on_wire(HELLO))
            link, heard = await victim.first_link()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            link.send(1, numbered(1, [bytes(40_000_000)]), Priority.BULK)
            assert isinstance(await heard.until_lost(), LinkLost)
        victim.accepted.clear()

    attack(scenario)


def test_pings_of_a_peer_that_reads_nothing_pile_nothing_up() -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.connect(parse_address(victim.address))
        _, writer = await asyncio.open_connection(sock=sock, ssl=client_context(Identity.generate()), server_hostname="")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(on_wire(HELLO) + on_wire(Ping(1)) * 20_000 + on_wire(numbered(1).message, channel=2))
        link, heard = await victim.first_link()
        await heard.until_frames(1)  # so all pings have been read
        assert isinstance(victim.transport, TcpTransport)
        assert isinstance(link, FrameLink)
        assert victim.transport._setup.links.uplink.queued_bytes(link) == 0
        writer.transport.abort()
        victim.accepted.clear()

    attack(scenario, config=replace(QUICK, idle_frames_burst=30_000))


def test_pings_without_end_and_without_a_pause_end_their_link() -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        async with raw(victim, tls=client_context(Identity.generate())) as (_, writer):
            writer.write(on_wire(HELLO))
            _, heard = await victim.first_link()
            writer.write(on_wire(Ping(1)) * 20_000)
            assert "of no use" in str(await heard.until_lost())
        victim.accepted.clear()

    attack(scenario)


def test_thousands_of_half_open_handshakes_keep_nobody_out_and_take_bounded_memory() -> None:
    """2,000 sockets of a stranger that say nothing, then half a handshake; an honest peer comes from the same address."""

    async def scenario(world: TcpWorld, victim: Node) -> None:
        stranger = TlsStream(client_context(Identity.generate()), server_side=False)
        stranger.shake_hands()
        greeting = stranger.take_outgoing()
        held: list[socket.socket] = []
        before = psutil.Process().memory_info().rss
        try:
            for number in range(2000):
                held.append(await connected(victim))
                if number % 2:
                    with suppress(OSError):
                        held[-1].send(greeting)
            assert isinstance(victim.listener, TcpListener)
            gate = victim.listener._gate
            assert gate.greetings <= 64
            link = await world.node().transport.dial(victim.node_id, [victim.address])
            assert link.is_up
            assert gate.greetings <= 64
            assert psutil.Process().memory_info().rss - before < 32 * 1024**2
        finally:
            for one in held:
                one.close()
        victim.accepted.clear()

    attack(scenario, GateConfig(burst=5000))


def test_an_address_that_connects_too_often_is_turned_away_before_anything_is_spent_on_it() -> None:
    async def scenario(world: TcpWorld, victim: Node) -> None:
        held = [await connected(victim) for _ in range(20)]
        await victim.until(lambda: len(victim.refused) >= 12)
        assert all("times a second" in str(error) for error in victim.refused[:12])
        assert isinstance(victim.listener, TcpListener)
        assert victim.listener._gate.connections == 8
        for one in held:
            one.close()
        await asyncio.sleep(0.5)  # a token or more comes back

    attack(scenario, GateConfig(burst=8, per_s=8.0))


def test_a_peer_that_does_not_read_but_shows_life_is_ended_and_holds_up_nobody() -> None:
    async def scenario(world: TcpWorld) -> None:
        victim = await world.listening()
        writer = await slow_reader(victim)
        try:
            link, heard = await victim.first_link()
            for _ in range(40):
                link.send(1, numbered(1, [bytes(1024**2)]), Priority.DECODE)
            honest = world.node()
            other = await honest.transport.dial(victim.node_id, [victim.address])
            other.start(Recorder())
            other.send(2, numbered(1), Priority.DECODE)
            await victim.until(lambda: len(victim.accepted) == 2)
            await victim.accepted[1][1].until_frames(1)
            while not heard.lost:
                writer.write(on_wire(Ping(1)))
                await asyncio.sleep(0.1)
            assert "has taken nothing" in str(heard.lost[0])
            assert other.is_up
        finally:
            writer.transport.abort()

    TcpWorld().run(scenario, LinkConfig(heartbeat_s=0.1, dead_after_s=0.5, stuck_after_s=1.0))


def test_where_all_links_together_have_too_much_queued_the_one_that_does_not_read_is_ended() -> None:
    async def scenario(world: TcpWorld) -> None:
        victim = await world.listening()
        writer = await slow_reader(victim)
        try:
            slow, heard = await victim.first_link()
            honest = world.node()
            other = await honest.transport.dial(victim.node_id, [victim.address])
            there = Recorder()
            other.start(there)
            await victim.until(lambda: len(victim.accepted) == 2)
            back = victim.accepted[1][0]
            for _ in range(8):
                slow.send(1, numbered(1, [bytes(1024**2)]), Priority.DECODE)
            assert slow.is_up
            for number in range(20):
                back.send(1, numbered(number, [bytes(1024**2)]), Priority.DECODE)
                await there.until_frames(number + 1)
            slow.send(1, numbered(1, [bytes(8 * 1024**2)]), Priority.DECODE)
            assert isinstance(await heard.until_lost(), LinkOverloaded)
            assert back.is_up
        finally:
            writer.transport.abort()

    TcpWorld().run(scenario, LinkConfig(max_queued_bytes_in_all=12 * 1024**2))


async def connected(victim: Node) -> socket.socket:
    """A bare socket. A blocking one would wait for this very process to accept it."""
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, parse_address(victim.address))
    return sock


async def slow_reader(victim: Node) -> asyncio.StreamWriter:
    """A link whose other end has stopped reading."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.connect(parse_address(victim.address))
    _, writer = await asyncio.open_connection(sock=sock, ssl=client_context(Identity.generate()), server_hostname="")
    writer.write(on_wire(HELLO))
    await victim.first_link()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    return writer


def test_an_address_that_opens_sessions_too_fast_is_refused_those_and_nothing_else() -> None:
    async def scenario(world: TcpWorld) -> None:
        here, there = world.node(), await world.listening()
        link = await here.transport.dial(there.node_id, [there.address])
        recorder = Recorder()
        link.start(recorder)
        for number in range(60):
            link.send(2 + 2 * number, Frame(Open(b"", b"")), Priority.DECODE)
        _, heard = await there.first_link()
        await recorder.until_frames(9)
        assert {frame.message.code for _, frame in recorder.frames if isinstance(frame.message, Fault)} == {"session_refused"}
        assert link.is_up
        assert len(heard.frames) in range(50, 52)

    TcpWorld().run(scenario, LinkConfig(openings_burst=50, openings_per_s=1.0))


def test_a_server_that_is_no_node_is_unreachable_with_the_reason() -> None:
    async def scenario(world: TcpWorld) -> None:
        async def chat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example ESMTP\r\n")
            await reader.read()
            writer.close()

        server = await asyncio.start_server(chat, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unreachable, match="TLS") as caught:
            await world.node().transport.dial(NodeId("0" * 64), [f"127.0.0.1:{port}"])
        assert caught.value.hint
        server.close()
        await asyncio.sleep(0.05)

    TcpWorld().run(scenario, QUICK)


def test_a_server_that_accepts_and_says_nothing_is_unreachable_in_time() -> None:
    async def scenario(world: TcpWorld) -> None:
        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(mute, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(Unreachable, match=address):
            await world.node().transport.dial(NodeId("0" * 64), [address])
        server.close()
        await asyncio.sleep(0.05)

    TcpWorld().run(scenario, QUICK)


def test_the_dialler_refuses_a_key_that_answers_in_place_of_the_one_dialled_before_sending_anything() -> None:
    async def scenario(world: TcpWorld) -> None:
        seen = asyncio.get_running_loop().create_future()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.set_result(await reader.read())
            writer.close()

        server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=server_context(Identity.generate()))
        with pytest.raises(FarflungError, match="answers there"):
            await world.node().transport.dial(NodeId("0" * 64), [f"127.0.0.1:{server.sockets[0].getsockname()[1]}"])
        assert await seen == b""
        server.close()
        await asyncio.sleep(0.05)

    TcpWorld().run(scenario)


@pytest.mark.parametrize("address", ["203.0.113.1:0", "no-such-host.invalid:0"])
def test_listening_where_this_machine_is_not_is_unreachable(address: str) -> None:
    async def scenario(world: TcpWorld) -> None:
        with pytest.raises(Unreachable, match=address) as caught:
            await world.node().transport.listen(address, lambda link: None)
        assert "0.0.0.0" in caught.value.hint

    TcpWorld().run(scenario)


def test_links_go_over_ipv6_where_there_is_any() -> None:
    async def scenario(world: TcpWorld) -> None:
        there = world.node()
        try:
            there.listener = await there.transport.listen("[::1]:0", there.on_link)
        except (Unreachable, UsageError):
            pytest.skip("no IPv6 on this machine")
        assert there.address.startswith("[::1]:")
        assert (await world.node().transport.dial(there.node_id, [there.address])).is_up

    TcpWorld().run(scenario)


CHILD = """
import asyncio, sys
from farflung.identity import Identity
from farflung.transport.tcp import TcpListener, TcpTransport
from farflung.transport.tls import TlsStream

class Quiet:
    def on_frame(self, link, channel, frame): pass
    def on_lost(self, link, error): pass

async def main():
    transport = TcpTransport(Identity.generate())
    listener = await transport.listen("127.0.0.1:0", lambda link: link.start(Quiet()))
    print(transport.node_id, listener.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def child_process() -> AsyncIterator[tuple[asyncio.subprocess.Process, NodeId, str]]:
    """Another process with a node in it, its id and its address."""
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, stdout=asyncio.subprocess.PIPE)
    try:
        assert child.stdout is not None
        node_id, address = (await child.stdout.readline()).decode().split()
        yield child, NodeId(node_id), address
    finally:
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)  # not child.kill(): it may reap the child before asyncio's watcher does
        await child.communicate()


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize("deadly", ["SIGKILL", "SIGSTOP"])
def test_a_process_that_is_killed_or_stopped_is_lost_within_the_time_that_is_set(deadly: str) -> None:
    async def scenario(world: TcpWorld) -> None:
        async with child_process() as (child, node_id, address):
            link = await world.node().transport.dial(node_id, [address])
            heard = Recorder()
            link.start(heard)
            os.kill(child.pid, getattr(signal, deadly))
            async with asyncio.timeout(3):
                error = await heard.until_lost()
            assert isinstance(error, LinkLost)
            assert node_id[:8] in str(error)

    TcpWorld().run(scenario, LinkConfig(heartbeat_s=0.2, dead_after_s=1.0))


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_node_that_was_busy_itself_for_long_does_not_take_its_peer_for_dead() -> None:
    async def scenario(world: TcpWorld) -> None:
        async with child_process() as (_, node_id, address):
            link = await world.node().transport.dial(node_id, [address])
            link.start(Recorder())
            await asyncio.sleep(0.3)
            assert isinstance(link, FrameLink)
            # In one turn of the loop with the heartbeat and just before it: the heartbeat comes late, and before any reading.
            asyncio.get_running_loop().call_at(link._beat_at - 1e-4, time.sleep, 1.2)
            await asyncio.sleep(1.5)
            assert link.is_up

    TcpWorld().run(scenario, LinkConfig(heartbeat_s=0.2, dead_after_s=1.0))

"""The directory against bad networks, bad clients and bad directories, over real sockets."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from random import Random
from typing import Any

import msgspec
import pytest
from swarm_samples import NOW, Clock, a_record, signed, signed_as_is, withdrawal

from farflung.core.errors import (
    AddressInUse,
    BadSignature,
    DirectoryError,
    DirectoryUnreachable,
    FarflungError,
    RecordRefused,
    Unreachable,
    UsageError,
)
from farflung.identity.keys import Identity
from farflung.swarm.backoff import BackoffConfig
from farflung.swarm.directory import NodeGone, NodeSeen, Snapshot
from farflung.swarm.http_client import HttpDirectory, HttpDirectoryConfig
from farflung.swarm.http_server import DirectoryServer, DirectoryServerConfig
from farflung.swarm.records import EVERYTHING, Query
from farflung.swarm.service import ServiceConfig
from farflung.swarm.table import TableConfig

ALICE, BOB = Identity.generate(), Identity.generate()
QUICK = BackoffConfig(first_s=0.02, longest_s=0.05)


def client(url: str, **changes: Any) -> HttpDirectory:
    config = HttpDirectoryConfig(url, **{"timeout_s": 1.0, "backoff": QUICK, **changes})
    return HttpDirectory(config, wall_clock=Clock(), random=Random(1))


def served(**changes: Any) -> DirectoryServer:
    return DirectoryServer(DirectoryServerConfig(**changes), Clock())


def address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


async def raw(url: str, request: bytes) -> tuple[int, dict[str, str]]:
    """Status and body of the answer to bytes that no honest client sends."""
    reader, writer = await asyncio.open_connection(*address_of(url))
    writer.write(request)
    status = int((await reader.readline()).split()[1])
    headers = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in headers.split(b"\r\n") if line.lower().startswith(b"content-length"))
    body = await reader.readexactly(length)
    writer.transport.abort()
    return status, json.loads(body)


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST " + path.encode() + b" HTTP/1.1", b"Host: x", *headers, b"", b""]
    return b"\r\n".join(lines) + body


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with asyncio.timeout(30):
            await scene()

    asyncio.run(whole())


def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    async def scene() -> None:
        async with served() as server:
            announced = post("/v1/records", b"", b"Content-Length: 1048576")  # and not a byte of it sent
            status, body = await raw(server.url, announced)
            assert (status, body["code"]) == (413, "frame_too_large")
            chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
            status, body = await raw(server.url, post("/v1/records", chunk * 32, b"Transfer-Encoding: chunked"))
            assert (status, body["code"]) == (413, "frame_too_large")
            assert "32768 bytes" in body["message"]
            for path in ("/v1/withdrawals", "/v1/links"):
                assert (await raw(server.url, post(path, b"", b"Content-Length: 99999999999")))[0] == 413

    play(scene)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1, 2]",
        b'{"text": 1, "signature": 2}',
        b'{"text": "not base64!", "signature": "AAAA"}',
        b"[" * 20_000,
        b"\xff\xfe\x00",
        b'{"text": null}',
    ],
)
def test_junk_instead_of_json_is_refused(body: bytes) -> None:
    async def scene() -> None:
        async with served() as server:
            request = post("/v1/records", body, b"Content-Length: " + str(len(body)).encode())
            status, told = await raw(server.url, request)
            assert (status, told["code"]) == (400, "usage_error")
            assert server.service.nodes == 0

    play(scene)


def test_a_record_for_a_foreign_node_id_is_refused_over_http() -> None:
    async def scene() -> None:
        forged = signed_as_is(BOB, msgspec.to_builtins(a_record(ALICE)))
        body = json.dumps(
            {"text": base64.b64encode(forged.text).decode(), "signature": base64.b64encode(forged.signature).decode()}
        )
        async with served() as server:
            request = post("/v1/records", body.encode(), b"Content-Length: " + str(len(body)).encode())
            status, told = await raw(server.url, request)
            assert (status, told["code"]) == (403, BadSignature.code)
            assert server.service.nodes == 0

    play(scene)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/watch?wait_s=nan",
        "/v1/watch?wait_s=-1",
        "/v1/watch?wait_s=x",
        "/v1/records?beside=6:2",
        "/v1/records?model=" + "x" * 300,
    ],
)
def test_a_question_that_makes_no_sense_is_answered_with_a_hint(target: str) -> None:
    async def scene() -> None:
        async with served() as server:
            status, told = await raw(server.url, f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert (status, told["code"]) == (400, "usage_error")

    play(scene)


def test_a_taken_port_and_a_foreign_address_are_named_with_a_hint() -> None:
    async def scene() -> None:
        async with served() as server:
            host, port = address_of(server.url)
            with pytest.raises(AddressInUse, match=f"{host}:{port} is taken") as caught:
                await served(listen=f"{host}:{port}").__aenter__()
            assert "--listen" in caught.value.hint
        with pytest.raises(Unreachable, match="cannot be listened on"):
            await served(listen="192.0.2.1:0").__aenter__()
        async with served(listen=f"{host}:{port}"):
            pass  # free again at once

    play(scene)


def test_the_server_leaves_signal_handlers_alone() -> None:
    async def scene() -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        async with served():
            assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    play(scene)


def test_the_server_ends_within_two_seconds_with_watchers_and_half_sent_requests_connected() -> None:
    async def scene() -> None:
        server = await served().__aenter__()
        directory = client(server.url)
        changes = directory.watch()
        assert await anext(changes) == Snapshot(())
        waiting = asyncio.create_task(anext(changes))
        half = await asyncio.open_connection(*address_of(server.url))
        half[1].write(post("/v1/records", b"half of it", b"Content-Length: 1000"))
        silent = await asyncio.open_connection(*address_of(server.url))
        status = await raw(server.url, b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status[1]["nodes"] == 0
        async with asyncio.timeout(2):
            await server.__aexit__(None, None, None)
        for reader, writer in (half, silent):
            async with asyncio.timeout(2):
                with suppress(ConnectionResetError):
                    await reader.read()
            writer.transport.abort()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await changes.aclose()
        await directory.aclose()

    play(scene)


def test_a_watch_survives_an_outage_and_a_restart_that_forgot_everybody() -> None:
    async def scene() -> None:
        async with served() as server:
            directory = client(server.url)
            changes = directory.watch()
            assert await anext(changes) == Snapshot(())
            await directory.announce(signed(ALICE))
            assert await anext(changes) == NodeSeen(a_record(ALICE))
            host, port = address_of(server.url)
        with pytest.raises(DirectoryUnreachable, match=server.url) as caught:
            await directory.records()
        assert server.url in caught.value.hint
        again = DirectoryServer(DirectoryServerConfig(listen=f"{host}:{port}"), Clock(NOW + 5))
        async with again:
            assert await anext(changes) == Snapshot((), restarted=True)
            await directory.announce(signed(BOB))
            assert await anext(changes) == NodeSeen(a_record(BOB))
            await directory.withdraw(withdrawal(BOB, 2))
            assert await anext(changes) == NodeGone(BOB.node_id)
        await changes.aclose()
        await directory.aclose()

    play(scene)


def test_one_watcher_too_many_is_refused_until_another_hangs_up() -> None:
    async def scene() -> None:
        async with served(service=ServiceConfig(max_watchers=1)) as server:

            def watch(cursor: str, wait_s: float) -> bytes:
                return f"GET /v1/watch?wait_s={wait_s}&cursor={cursor} HTTP/1.1\r\nHost: x\r\n\r\n".encode()

            async def until_watchers(count: int) -> None:
                while server.service.watchers != count:  # noqa: ASYNC110 - nothing tells of a connection that was lost
                    await asyncio.sleep(0.005)

            cursor = (await raw(server.url, watch("", 0)))[1]["cursor"]
            first = (await asyncio.open_connection(*address_of(server.url)))[1]
            first.write(watch(cursor, 25))
            await until_watchers(1)
            status, told = await raw(server.url, watch(cursor, 25))
            assert (status, told["code"]) == (503, DirectoryError.code)
            first.transport.abort()
            async with asyncio.timeout(5):  # not the 25 s it would have waited
                await until_watchers(0)
            assert (await raw(server.url, watch(cursor, 0.01)))[0] == 200

    play(scene)


def test_a_directory_that_does_not_exist_or_does_not_answer_is_unreachable_within_the_timeout() -> None:
    async def scene() -> None:
        async with served() as server:
            gone = server.url
        silent = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        for url, message in ((gone, "cannot be reached"), (f"http://127.0.0.1:{port}", "no answer within 0.2 s")):
            directory = client(url, timeout_s=0.2)
            with pytest.raises(DirectoryUnreachable, match=message) as caught:
                await directory.announce(signed(ALICE))
            assert "farflung directory" in caught.value.hint
            await directory.aclose()
        silent.close()

    play(scene)


@pytest.mark.parametrize("url", ["", "localhost:7700", "ftp://x:1", "http://", "http://[::1", "http://x:99999999"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is no URL of a directory"):
        client(url)


@asynccontextmanager
async def answering(status: str, body: bytes) -> AsyncIterator[str]:
    """A hostile directory: gives every request the same answer."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        ("200 OK", b"<html>hello</html>", DirectoryError, "answers nonsense"),
        ("200 OK", b"[" * 50_000, DirectoryError, "answers nonsense"),
        ("200 OK", b" " * 200_000, DirectoryError, "answers more than 100000 bytes"),
        ("404 Not Found", b"no such page", DirectoryError, "status 404"),
        ("502 Bad Gateway", b"<html>", DirectoryUnreachable, "status 502"),
        ("409 Conflict", b'{"code":"record_refused","message":"no\\u001b[31m red"}', RecordRefused, r"^no \[31m red$"),
        ("400 Bad Request", b'{"code":"no_such_code","message":"m"}', DirectoryError, "status 400: m"),
        ("404 Not Found", b'{"code":"link_lost","message":"m"}', DirectoryError, "status 404: m"),
        ("403 Forbidden", b'{"code":"bad_signature","message":"m"}', DirectoryError, "status 403: m"),
        ("400 Bad Request", b'{"code":"usage_error","message":"m"}', UsageError, "^m$"),
        ("302 Found", b"", DirectoryError, "status 302"),
    ],
)
def test_a_directory_that_answers_nonsense_is_told_from_one_that_refuses(
    status: str, body: bytes, kind: type[FarflungError], message: str
) -> None:
    async def scene() -> None:
        async with answering(status, body) as url:
            directory = client(url, max_answer_bytes=100_000)
            with pytest.raises(kind, match=message):
                await directory.records()
            await directory.aclose()

    play(scene)


def test_a_node_that_is_not_understood_hears_a_refusal_and_nothing_else() -> None:
    async def scene() -> None:
        async with answering("400 Bad Request", b'{"code":"usage_error","message":"no such path"}') as url:
            directory = client(url)
            with pytest.raises(RecordRefused, match="no such path"):
                await directory.announce(signed(ALICE))
            await directory.aclose()

    play(scene)


def test_a_connection_that_closes_while_idle_costs_no_renewal() -> None:
    async def scene() -> None:
        requests = 0

        async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal requests
            for answer in (b"HTTP/1.1 204 No Content\r\n\r\n", b""):
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-len")
                )
                await reader.readexactly(length)
                requests += 1
                writer.write(answer)
            writer.close()

        server = await asyncio.start_server(answer_once, "127.0.0.1", 0)
        directory = client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await directory.announce(signed(ALICE))
        await directory.announce(signed(ALICE, sequence=2))
        assert requests == 3  # the second one twice
        await directory.aclose()
        server.close()

    play(scene)


@pytest.mark.parametrize("said", [b"", b"POST /v1/rec", post("/v1/records", b"half of it", b"Content-Length: 1000")])
def test_a_connection_without_a_whole_request_is_closed(said: bytes) -> None:
    async def scene() -> None:
        async with served(request_timeout_s=0.1) as server:
            reader, writer = await asyncio.open_connection(*address_of(server.url))
            health = b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n"
            writer.write(health)
            await reader.readuntil(b"}")
            writer.write(health)  # a kept connection may be silent, and its next request has the whole time
            await reader.readuntil(b"}")
            writer.write(said)
            silent = await asyncio.open_connection(*address_of(server.url))
            silent[1].write(said)
            for end in (silent[0], *([reader] if said else [])):
                with suppress(ConnectionResetError):
                    assert await end.read() == b""
            writer.transport.abort()
            silent[1].transport.abort()

    play(scene)


def test_watchers_leave_room_for_those_who_announce() -> None:
    async def scene() -> None:
        async with served(service=ServiceConfig(table=TableConfig(max_nodes=2))) as server:
            watchers = [client(server.url) for _ in range(6)]  # more than are let in
            tasks = [asyncio.create_task(follow_for_ever(one)) for one in watchers]
            while server.service.watchers < 4:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.005)
            node = client(server.url)
            for identity in (ALICE, BOB):
                await node.announce(signed(identity))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in (*watchers, node):
                await one.aclose()

    async def follow_for_ever(directory: HttpDirectory) -> None:
        async with aclosing(directory.watch()) as changes:
            async for _ in changes:
                pass

    play(scene)


def test_a_client_believes_no_record_that_it_has_not_verified_itself() -> None:
    async def scene() -> None:
        good, yesterdays = signed(ALICE), signed(BOB, issued_unix_s=NOW - 86_400)
        forged = signed_as_is(BOB, msgspec.to_builtins(a_record(ALICE)))
        unasked = signed(BOB, model="another")
        body = msgspec.json.encode({"records": [good, yesterdays, forged, unasked]})
        async with answering("200 OK", body) as url:
            directory = client(url)
            assert await directory.records(Query(model="test/tiny")) == [a_record(ALICE)]
            await directory.aclose()
        watched = {"cursor": "x", "snapshot": True, "records": [forged, good, yesterdays], "gone": []}
        async with answering("200 OK", msgspec.json.encode(watched)) as url:
            directory = client(url)
            async with aclosing(directory.watch(EVERYTHING)) as changes:
                assert await anext(changes) == Snapshot((a_record(ALICE),))
            await directory.aclose()

    play(scene)


def test_where_every_record_is_refused_the_reason_is_told_because_the_clock_here_is_wrong() -> None:
    async def scene() -> None:
        async with served() as server:
            directory = HttpDirectory(HttpDirectoryConfig(server.url), wall_clock=Clock(NOW + 3600), random=Random(1))
            await directory.announce(signed(ALICE))
            with pytest.raises(RecordRefused, match="issued 3600 s ago") as caught:
                await directory.records()
            assert "clocks" in caught.value.hint
            await directory.aclose()

    play(scene)


def test_a_proxy_named_in_the_environment_does_not_stand_before_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with served() as server:
            directory = client(server.url)
            assert await directory.records() == []
            await directory.aclose()

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    play(scene)

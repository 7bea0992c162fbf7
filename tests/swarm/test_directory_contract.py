"""What every directory does, whichever way it is reached: by direct call, on a virtual clock, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec
import pytest
from swarm_samples import NOW, OTHER_DIGEST, Clock, a_record, signed, signed_as_is, withdrawal

from farflung.core.errors import BadSignature, FarflungError, RecordRefused
from farflung.core.model import LayerRange
from farflung.identity.keys import Identity
from farflung.lab.virtual_clock import run_virtual
from farflung.swarm.directory import Change, Directory, NodeGone, NodeSeen, Snapshot
from farflung.swarm.http_client import HttpDirectory, HttpDirectoryConfig
from farflung.swarm.http_server import DirectoryServer, DirectoryServerConfig
from farflung.swarm.links import LinkReport, LinkTo, MeasuredLink, SignedLinks, sign_links
from farflung.swarm.memory_directory import MemoryDirectory
from farflung.swarm.records import EVERYTHING, Query, SignedRecord
from farflung.swarm.service import DirectoryService, ServiceConfig
from farflung.swarm.table import TableConfig

ALICE, BOB = Identity.generate(), Identity.generate()
SMALL = ServiceConfig(table=TableConfig(max_nodes=3))


@asynccontextmanager
async def memory(clock: Clock) -> AsyncIterator[Directory]:
    service = DirectoryService(SMALL, clock)
    directory = MemoryDirectory(service, Random(1))
    yield directory
    await directory.aclose()
    service.close()


@asynccontextmanager
async def http(clock: Clock) -> AsyncIterator[Directory]:
    async with DirectoryServer(DirectoryServerConfig(service=SMALL), clock) as server:
        directory = HttpDirectory(HttpDirectoryConfig(server.url), wall_clock=clock, random=Random(1))
        yield directory
        await directory.aclose()


@dataclass(frozen=True)
class Kind:
    name: str
    run: Callable[[Coroutine[Any, Any, None]], None]
    open: Callable[[Clock], AbstractAsyncContextManager[Directory]]


KINDS = [
    Kind("memory", asyncio.run, memory),
    Kind("memory on a virtual clock", run_virtual, memory),
    Kind("http", asyncio.run, http),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def play(request: pytest.FixtureRequest) -> Callable[[Callable[[Directory, Clock], Coroutine[Any, Any, None]]], None]:
    kind: Kind = request.param

    def run(scene: Callable[[Directory, Clock], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> None:
            clock = Clock()
            async with asyncio.timeout(30), kind.open(clock) as directory:
                await scene(directory, clock)

        kind.run(whole())

    return run


Play = Callable[[Callable[[Directory, Clock], Coroutine[Any, Any, None]]], None]


async def refused(call: Coroutine[Any, Any, None], kind: type[FarflungError], message: str) -> None:
    with pytest.raises(kind, match=message):
        await call


def test_what_is_announced_is_found_by_name_by_digest_and_by_neighbours_until_it_is_withdrawn(play: Play) -> None:
    async def scene(directory: Directory, clock: Clock) -> None:
        assert await directory.records() == []
        await directory.announce(signed(ALICE))
        await directory.announce(signed(BOB, digest=OTHER_DIGEST, model="other", layers="6:12"))
        assert await directory.records(Query(model="test/tiny")) == [a_record(ALICE)]
        assert [r.node_id for r in await directory.records(Query(model=OTHER_DIGEST))] == [BOB.node_id]
        assert [r.node_id for r in await directory.records(Query(beside=LayerRange(6, 12)))] == [ALICE.node_id]
        assert len(await directory.records()) == 2
        await directory.announce(signed(ALICE, sequence=2, kv_free_tokens=1))
        assert (await directory.records(Query(model="test/tiny")))[0].kv_free_tokens == 1
        await directory.withdraw(withdrawal(ALICE, 3))
        assert [r.node_id for r in await directory.records()] == [BOB.node_id]

    play(scene)


def test_a_record_expires_when_its_ttl_is_over(play: Play) -> None:
    async def scene(directory: Directory, clock: Clock) -> None:
        await directory.announce(signed(ALICE, ttl_s=1.0))
        await directory.announce(signed(BOB, ttl_s=60.0))
        async with aclosing(directory.watch()) as changes:
            assert isinstance(await anext(changes), Snapshot)
            assert await anext(changes) == NodeGone(ALICE.node_id)
        assert [r.node_id for r in await directory.records()] == [BOB.node_id]

    play(scene)


def test_a_watcher_gets_a_snapshot_then_changes_and_no_renewals(play: Play) -> None:
    async def scene(directory: Directory, clock: Clock) -> None:
        await directory.announce(signed(ALICE))
        heard: asyncio.Queue[Change] = asyncio.Queue()

        async def listen() -> None:
            async for change in directory.watch(Query(model="test/tiny")):
                heard.put_nowait(change)

        listening = asyncio.create_task(listen())
        assert await heard.get() == Snapshot((a_record(ALICE),))
        await directory.announce(signed(ALICE, sequence=2, kv_free_tokens=3))
        await directory.announce(signed(BOB, layers="6:12"))
        assert await heard.get() == NodeSeen(a_record(BOB, layers="6:12"))
        await directory.announce(signed(BOB, sequence=2, digest=OTHER_DIGEST, model="other"))
        assert await heard.get() == NodeGone(BOB.node_id)
        await directory.announce(signed(ALICE, sequence=3, status="draining"))
        assert await heard.get() == NodeSeen(a_record(ALICE, sequence=3, status="draining"))
        await directory.withdraw(withdrawal(ALICE, 4))
        assert await heard.get() == NodeGone(ALICE.node_id)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        assert heard.empty()

    play(scene)


def test_hostile_records_are_refused_and_leave_nothing_behind(play: Play) -> None:
    async def scene(directory: Directory, clock: Clock) -> None:
        good = signed(ALICE)
        fields = msgspec.to_builtins(a_record(ALICE))
        forged = SignedRecord(good.text.replace(b"192.0.2.7", b"192.0.2.8"), good.signature)
        await refused(directory.announce(forged), BadSignature, "is not that of node")
        await refused(directory.announce(signed_as_is(BOB, fields)), BadSignature, "is not that of node")
        await refused(directory.announce(signed_as_is(ALICE, fields, context="links/1")), BadSignature, "record/1")
        await refused(directory.announce(SignedRecord(b"junk", b"\0" * 64)), RecordRefused, "cannot be read")
        await refused(directory.announce(SignedRecord(b" " * 17_000, b"\0" * 64)), RecordRefused, "17000 bytes")
        await refused(directory.announce(signed_as_is(ALICE, {**fields, "layers": [0, 19]})), RecordRefused, "0:19")
        await refused(_forged_leave(directory), BadSignature, "withdrawal/1")
        assert await directory.records() == []

    play(scene)


async def _forged_leave(directory: Directory) -> None:
    good = withdrawal(ALICE, 9)
    await directory.withdraw(type(good)(good.text, withdrawal(BOB, 9).signature))


def test_a_record_replayed_from_yesterday_or_from_before_a_withdrawal_is_refused(play: Play) -> None:
    async def scene(directory: Directory, clock: Clock) -> None:
        old = signed(ALICE)
        await directory.announce(old)
        await refused(directory.announce(old), RecordRefused, "not newer than 1")
        await directory.withdraw(withdrawal(ALICE, 2))
        await refused(directory.announce(old), RecordRefused, "not newer than 2")
        clock.now = NOW + 86_400
        await refused(directory.announce(old), RecordRefused, "86400 s ago")
        await refused(directory.announce(signed(BOB, issued_unix_s=clock.now + 300)), RecordRefused, "in the future")
        assert await directory.records() == []

    play(scene)


def test_a_full_directory_says_so(play: Play) -> None:
    async def scene(directory: Directory, clock: Clock) -> None:
        for _ in range(3):
            await directory.announce(signed(Identity.generate()))
        await refused(directory.announce(signed(ALICE)), RecordRefused, "keeps 3 nodes")
        with pytest.raises(RecordRefused) as caught:
            await directory.announce(signed(ALICE))
        assert "another directory" in caught.value.hint

    play(scene)


def report(identity: Identity, sequence: int, *links: LinkTo) -> SignedLinks:
    said = LinkReport(node_id=identity.node_id, sequence=sequence, issued_unix_s=NOW, ttl_s=60.0, links=links)
    return sign_links(identity, said)


def test_measured_links_come_from_announced_nodes_and_go_with_them(play: Play) -> None:
    async def scene(directory: Directory, clock: Clock) -> None:
        first = report(ALICE, 1, LinkTo(BOB.node_id, 0.05, 1e6))
        await refused(directory.report_links(first), RecordRefused, "not in the directory")
        await directory.announce(signed(ALICE))
        await directory.report_links(first)
        assert await directory.links() == [MeasuredLink(ALICE.node_id, BOB.node_id, 0.05, 1e6)]
        await refused(directory.report_links(first), RecordRefused, "not newer")
        forged = SignedLinks(first.text, report(BOB, 1).signature)
        await refused(directory.report_links(forged), BadSignature, "links/1")
        await directory.report_links(report(ALICE, 2, LinkTo(BOB.node_id, 0.06)))
        assert await directory.links() == [MeasuredLink(ALICE.node_id, BOB.node_id, 0.06, 0.0)]
        await directory.withdraw(withdrawal(ALICE, 2))
        assert await directory.links() == []

    play(scene)


def test_many_watchers_hear_of_a_node_each_once(play: Play) -> None:
    async def scene(directory: Directory, clock: Clock) -> None:
        async def first_news() -> Change:
            async with aclosing(directory.watch(EVERYTHING)) as changes:
                assert await anext(changes) == Snapshot(())
                ready.release()
                return await anext(changes)

        ready = asyncio.Semaphore(0)
        watchers = [asyncio.create_task(first_news()) for _ in range(8)]
        for _ in watchers:
            await ready.acquire()
        await directory.announce(signed(ALICE))
        assert await asyncio.gather(*watchers) == [NodeSeen(a_record(ALICE))] * 8

    play(scene)

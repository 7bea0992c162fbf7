"""The announcer and the roster, hours of them on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from random import Random
from typing import ClassVar

import pytest
from swarm_samples import DIGEST, NOW, a_record, signed

from farflung.core.errors import (
    BadSignature,
    DeadlineExceeded,
    DirectoryUnreachable,
    FarflungError,
    LinkLost,
    RecordRefused,
    StageFailed,
    Unreachable,
    UsageError,
)
from farflung.identity.keys import Identity
from farflung.lab.virtual_clock import run_virtual
from farflung.swarm.announcer import Announcer, AnnouncerConfig
from farflung.swarm.backoff import Backoff, BackoffConfig
from farflung.swarm.directory import Change, NodeGone, NodeSeen, Snapshot, Update, follow
from farflung.swarm.memory_directory import MemoryDirectory
from farflung.swarm.records import EVERYTHING, NodeRecord, Query, SignedRecord, open_record
from farflung.swarm.roster import Roster
from farflung.swarm.service import DirectoryService, ServiceConfig

ALICE, BOB = Identity.generate(), Identity.generate()


def wall_clock() -> float:
    return NOW + asyncio.get_running_loop().time()


def new_service() -> DirectoryService:
    return DirectoryService(ServiceConfig(), wall_clock)


def maker(identity: Identity, **changes: object) -> Callable[[int, float], NodeRecord]:
    return lambda sequence, now: a_record(identity, sequence=sequence, issued_unix_s=now, **changes)


def announcer(identity: Identity, directory: MemoryDirectory, **changes: object) -> Announcer:
    make_record = maker(identity, **changes)
    return Announcer(AnnouncerConfig(ttl_s=60.0), directory, identity, make_record, wall_clock=wall_clock, random=Random(2))


def play(scene: Callable[[DirectoryService, MemoryDirectory], Awaitable[None]]) -> None:
    async def whole() -> None:
        service = new_service()
        await scene(service, MemoryDirectory(service, Random(3)))

    run_virtual(whole())


def test_a_node_stays_in_the_directory_for_hours_and_leaves_when_it_stops() -> None:
    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        async with announcer(ALICE, directory) as announcing:
            await announcing.announced(1.0)
            sequences = set()
            for _ in range(240):
                await asyncio.sleep(30)
                (entry,) = service.entries()
                assert entry.record.issued_unix_s > wall_clock() - 21
                sequences.add(entry.record.sequence)
            assert len(sequences) > 230
        assert service.nodes == 0

    play(scene)


def test_a_node_that_dies_without_a_word_is_gone_after_its_ttl() -> None:
    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        own = MemoryDirectory(service, Random(4))
        async with announcer(ALICE, own) as announcing, Roster(directory) as roster:
            await announcing.announced(1.0)
            await roster.find(ALICE.node_id, 1.0)
            own.reachable = False
            cut = asyncio.get_running_loop().time()
            await roster.until(lambda records: not records, 70.0)
            assert 40.0 <= asyncio.get_running_loop().time() - cut <= 60.1

    play(scene)


def test_an_outage_of_the_directory_is_survived_and_the_node_comes_back_with_it() -> None:
    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        async with announcer(ALICE, directory) as announcing, Roster(directory) as roster:
            await announcing.announced(1.0)
            await roster.find(ALICE.node_id, 1.0)
            directory.reachable = False
            await asyncio.sleep(3600)
            assert service.nodes == 0
            assert [record.node_id for record in roster.records] == [ALICE.node_id]  # better an old address than none
            directory.reachable = True
            await asyncio.sleep(10.1)  # the longest pause between tries
            assert service.nodes == 1
            assert len(roster.records) == 1

    play(scene)


def test_no_answer_of_a_directory_ends_the_announcing() -> None:
    class Confused(MemoryDirectory):
        answers: ClassVar[list[FarflungError]] = [LinkLost("hm"), UsageError("hm"), StageFailed("hm")]

        async def announce(self, signed: SignedRecord) -> None:
            if self.answers:
                raise self.answers.pop()
            await super().announce(signed)

    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        async with announcer(ALICE, Confused(service, Random(4))) as announcing:
            await announcing.announced(5.0)
            assert service.nodes == 1

    play(scene)


def test_what_ends_an_announcer_or_a_roster_reaches_their_owner_and_those_who_wait() -> None:
    class NotUnderstood(MemoryDirectory):
        def watch(self, query: Query = EVERYTHING) -> AsyncGenerator[Change, None]:
            async def refused(cursor: str) -> Update:
                raise UsageError("what is beside=?")

            return follow(refused, Backoff(BackoffConfig(), Random(1)), "test")

    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        def broken(sequence: int, now: float) -> NodeRecord:
            raise ZeroDivisionError

        async def live(one: Announcer | Roster, wait: Callable[[], Awaitable[object]]) -> None:
            async with one:
                with pytest.raises((ZeroDivisionError, UsageError)):
                    await one.ended()
                with pytest.raises((ZeroDivisionError, UsageError)):
                    await wait()

        announcing = Announcer(AnnouncerConfig(), directory, ALICE, broken, wall_clock=wall_clock, random=Random(2))
        with pytest.raises(ZeroDivisionError):
            await live(announcing, lambda: announcing.announced(3.0))
        roster = Roster(NotUnderstood(service, Random(1)))
        with pytest.raises(UsageError, match="beside"):
            await live(roster, lambda: roster.find(ALICE.node_id, 3.0))
        async with announcer(ALICE, directory) as healthy:
            waiting = asyncio.create_task(healthy.ended())
        await waiting  # left in order

    play(scene)


def test_a_first_announcement_that_was_given_up_on_its_way_is_withdrawn() -> None:
    class Slow(MemoryDirectory):
        async def announce(self, signed: SignedRecord) -> None:
            await super().announce(signed)
            await asyncio.sleep(60)  # the answer never comes

    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        async with announcer(ALICE, Slow(service, Random(4))):
            await asyncio.sleep(1)
            assert service.nodes == 1
        assert service.nodes == 0

    play(scene)


def test_a_directory_that_restarts_empties_no_roster_and_who_left_meanwhile_is_gone_after_a_ttl() -> None:
    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        current = [service]

        class Restarting(MemoryDirectory):
            def _reach(self) -> DirectoryService:
                return current[0]

        alices, bobs, ours = (Restarting(service, Random(seed)) for seed in range(3))
        async with Roster(ours) as roster, announcer(ALICE, alices) as announcing:
            async with announcer(BOB, bobs) as other:
                await announcing.announced(1.0)
                await other.announced(1.0)
                await roster.until(lambda records: len(records) == 2, 1.0)
                current[0] = new_service()
                service.close()
            fewest = 2
            for _ in range(100):  # 50 s: both renew within 20 s, but Bob has left
                await asyncio.sleep(0.5)
                fewest = min(fewest, len(roster.records))
            assert fewest == 2
            await asyncio.sleep(15)  # the ttl is 60 s
            assert [record.node_id for record in roster.records] == [ALICE.node_id]

    play(scene)


def test_a_node_started_before_its_directory_says_so_and_joins_when_it_is_there() -> None:
    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        directory.reachable = False
        async with announcer(ALICE, directory) as announcing:
            with pytest.raises(DirectoryUnreachable, match="within 3 s: the directory in memory is cut off"):
                await announcing.announced(3.0)
            directory.reachable = True
            await announcing.announced(10.0)
            assert service.nodes == 1

    play(scene)


def test_a_restarted_node_replaces_itself_at_once() -> None:
    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        own = MemoryDirectory(service, Random(4))
        async with announcer(ALICE, own) as announcing:
            await announcing.announced(1.0)
            own.reachable = False  # killed: it withdraws nothing
        await asyncio.sleep(0.01)
        async with announcer(ALICE, directory, layers="6:12") as announcing:
            await announcing.announced(1.0)
            assert [str(entry.record.layers) for entry in service.entries()] == ["6:12"]

    play(scene)


def test_a_refusal_reaches_whoever_waits_to_be_announced() -> None:
    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        late = Announcer(
            AnnouncerConfig(),
            directory,
            ALICE,
            maker(ALICE),
            wall_clock=lambda: NOW - 900,
            random=Random(2),
        )
        async with late:
            with pytest.raises(RecordRefused, match="issued 900 s ago"):
                await late.announced(1.0)

    play(scene)


def test_a_changed_record_is_announced_without_waiting_for_the_renewal() -> None:
    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        status = ["serving"]

        def make(sequence: int, now: float) -> NodeRecord:
            return maker(ALICE, status=status[0])(sequence, now)

        announcing = Announcer(
            AnnouncerConfig(),
            directory,
            ALICE,
            make,
            wall_clock=wall_clock,
            random=Random(2),
        )
        async with announcing, Roster(directory) as roster:
            await roster.find(ALICE.node_id, 1.0)
            status[0] = "draining"
            announcing.announce_now()
            await roster.until(lambda records: records[0].status == "draining", 0.2)

    play(scene)


def test_the_roster_waits_for_a_node_and_names_the_one_that_never_comes() -> None:
    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        async with Roster(directory, Query(model=DIGEST)) as roster:
            later = asyncio.get_running_loop().call_later(2.0, lambda: service.announce(signed(ALICE, issued_unix_s=NOW)))
            assert (await roster.find(ALICE.node_id, 3.0)).addresses == ("192.0.2.7:7400",)
            with pytest.raises(Unreachable, match=f"node {BOB.node_id[:8]} is not in the directory"):
                await roster.find(BOB.node_id, 3.0)
            with pytest.raises(DeadlineExceeded, match="1 are"):
                await roster.until(lambda records: len(records) == 2, 3.0)
            later.cancel()

    play(scene)


def test_the_roster_of_a_directory_that_never_answered_says_that() -> None:
    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        directory.reachable = False
        async with Roster(directory) as roster:
            with pytest.raises(DirectoryUnreachable, match="no answer within 3 s"):
                await roster.find(ALICE.node_id, 3.0)

    play(scene)


def test_a_directory_that_serves_old_records_again_turns_no_roster_back() -> None:
    class Liar(MemoryDirectory):
        async def watch(self, query: Query = Query()):  # type: ignore[no-untyped-def, override]  # noqa: B008
            yield Snapshot(())
            yield NodeSeen(a_record(ALICE, sequence=7, addresses=("192.0.2.7:7",)))
            yield NodeSeen(a_record(ALICE, sequence=3, addresses=("192.0.2.3:3",)))
            yield Snapshot((a_record(ALICE, sequence=4, addresses=("192.0.2.4:4",)), a_record(BOB)))

    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        async with Roster(Liar(service, Random(1))) as roster:
            await roster.find(BOB.node_id, 1.0)
            record = roster.get(ALICE.node_id)
            assert record is not None
            assert record.sequence == 7

    play(scene)


def test_a_swarm_repeats_itself_from_its_seed_and_wakes_no_watcher_for_renewals() -> None:
    identities = [Identity.generate() for _ in range(40)]

    async def run() -> list[tuple[float, Change]]:
        service, random = new_service(), Random(11)
        heard: list[tuple[float, Change]] = []

        async def live(identity: Identity, layers: str) -> None:
            await asyncio.sleep(random.uniform(0, 30))
            directory = MemoryDirectory(service, Random(random.random()))
            async with Announcer(
                AnnouncerConfig(), directory, identity, maker(identity, layers=layers), wall_clock=wall_clock, random=random
            ):
                await asyncio.sleep(random.uniform(100, 600))
                directory.reachable = random.random() < 0.5

        async def listen() -> None:
            async for change in MemoryDirectory(service, Random(1)).watch():
                heard.append((asyncio.get_running_loop().time(), change))

        async with asyncio.TaskGroup() as group:
            listening = group.create_task(listen())
            nodes = [group.create_task(live(one, ("0:9", "9:18")[i % 2])) for i, one in enumerate(identities)]
            await asyncio.wait(nodes)
            await asyncio.sleep(70)
            listening.cancel()
        assert service.nodes == 0
        return heard

    first = run_virtual(run())
    assert first == run_virtual(run())
    assert sum(isinstance(change, NodeSeen) for _, change in first) == 40
    assert sum(isinstance(change, NodeGone) for _, change in first) == 40


def test_what_the_announcer_sends_is_signed_by_its_own_key() -> None:
    async def scene(service: DirectoryService, directory: MemoryDirectory) -> None:
        async with announcer(ALICE, directory) as announcing:
            await announcing.announced(1.0)
            (entry,) = service.entries()
            assert open_record(entry.signed, wall_clock()) == entry.record
            with pytest.raises(BadSignature):
                open_record(type(entry.signed)(entry.signed.text + b" ", entry.signed.signature), wall_clock())

    play(scene)

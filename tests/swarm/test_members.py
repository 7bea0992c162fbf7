"""The directory of a private swarm: strangers' records are neither taken nor seen."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from random import Random

import pytest
from swarm_samples import Clock, a_record, signed

from farflung.core.errors import RecordRefused
from farflung.identity.keys import Identity
from farflung.identity.swarm_key import SwarmKey
from farflung.swarm.directory import NodeGone, NodeSeen, Snapshot
from farflung.swarm.members import is_member, members_only
from farflung.swarm.memory_directory import MemoryDirectory
from farflung.swarm.service import DirectoryService, ServiceConfig

KEY, OTHER = SwarmKey(bytes(range(32))), SwarmKey(bytes(32))
ALICE, BOB, EVE = Identity.generate(), Identity.generate(), Identity.generate()


def proof(identity: Identity, key: SwarmKey = KEY) -> str:
    return key.record_proof(identity.node_id)


def test_a_proof_of_membership_is_of_one_node_and_one_swarm() -> None:
    assert is_member(KEY, a_record(ALICE, membership=proof(ALICE)))
    for stolen in ("", proof(BOB), proof(ALICE, OTHER), "é" * 64):
        assert not is_member(KEY, a_record(ALICE, membership=stolen))


def test_members_see_each_other_and_no_stranger() -> None:
    async def scenario() -> None:
        service = DirectoryService(ServiceConfig(), Clock())
        outer = MemoryDirectory(service, Random(1))
        inner = members_only(outer, KEY)
        await inner.announce(signed(ALICE, membership=proof(ALICE)))
        await inner.announce(signed(EVE, membership=proof(ALICE)))  # copied from a public record
        assert [record.node_id for record in await inner.records()] == [ALICE.node_id]
        assert len(await outer.records()) == 2
        async with aclosing(inner.watch()) as changes:
            first = await anext(changes)
            assert isinstance(first, Snapshot)
            assert [record.node_id for record in first.records] == [ALICE.node_id]
            await inner.announce(signed(BOB, membership=proof(BOB)))
            seen = await anext(changes)
            assert isinstance(seen, NodeSeen)
            assert seen.record.node_id == BOB.node_id
            await inner.announce(signed(BOB, sequence=2, membership=proof(BOB, OTHER)))
            assert await anext(changes) == NodeGone(BOB.node_id)
        service.close()

    asyncio.run(scenario())


def test_a_directory_with_a_swarms_key_takes_its_members_alone() -> None:
    async def scenario() -> None:
        service = DirectoryService(ServiceConfig(swarm_key=KEY), Clock())
        service.announce(signed(ALICE, membership=proof(ALICE)))
        for membership in ("", proof(ALICE), proof(EVE, OTHER)):
            with pytest.raises(RecordRefused, match="does not show the key") as caught:
                service.announce(signed(EVE, membership=membership))
            assert caught.value.hint
        assert service.nodes == 1

    asyncio.run(scenario())


def test_without_a_key_everybody_is_seen() -> None:
    async def scenario() -> None:
        service = DirectoryService(ServiceConfig(), Clock())
        directory = members_only(MemoryDirectory(service, Random(1)), None)
        await directory.announce(signed(EVE))
        assert len(await directory.records()) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("membership", ["x", "a" * 63, "A" * 64, "g" * 64])
def test_a_record_with_a_malformed_proof_is_refused(membership: str) -> None:
    with pytest.raises(RecordRefused, match="proof of membership"):
        signed(ALICE, membership=membership)

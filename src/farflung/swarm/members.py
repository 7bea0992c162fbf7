"""The directory of a private swarm as its members see it: records of strangers are not there.

A directory takes records from whoever reaches it, and a stranger's node would only cost its driver a detour. So a member's
record carries a proof of knowing the swarm's key (``NodeRecord.membership``), bound to its node id: public, and of no use to
others, because a record counts under its own node's signature only.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace

from farflung.core.errors import RecordRefused
from farflung.core.ids import short
from farflung.identity.swarm_key import SwarmKey
from farflung.swarm.directory import Change, Directory, NodeGone, NodeSeen, Snapshot
from farflung.swarm.links import MeasuredLink, SignedLinks
from farflung.swarm.records import EVERYTHING, NodeRecord, Query, SignedRecord, SignedWithdrawal


def is_member(key: SwarmKey, record: NodeRecord) -> bool:
    return key.is_record_proof(record.membership, record.node_id)


def check_member(key: SwarmKey, record: NodeRecord) -> None:
    """Raises RecordRefused where the record is a stranger's."""
    if not is_member(key, record):
        raise RecordRefused(
            f"node {short(record.node_id)} does not show the key of this directory's swarm",
            hint="start it with --swarm-key, and compare fingerprints: farflung key show FILE",
        )


class MembersOnly:
    """See ``Directory``; what is read of ``inner`` is the members' part."""

    def __init__(self, inner: Directory, key: SwarmKey) -> None:
        self._inner = inner
        self._key = key

    async def announce(self, signed: SignedRecord) -> None:
        await self._inner.announce(signed)

    async def withdraw(self, signed: SignedWithdrawal) -> None:
        await self._inner.withdraw(signed)

    async def records(self, query: Query = EVERYTHING) -> list[NodeRecord]:
        return [record for record in await self._inner.records(query) if is_member(self._key, record)]

    async def watch(self, query: Query = EVERYTHING) -> AsyncGenerator[Change, None]:
        async with contextlib.aclosing(self._inner.watch(query)) as changes:
            async for change in changes:
                yield self._seen(change)

    async def report_links(self, signed: SignedLinks) -> None:
        await self._inner.report_links(signed)

    async def links(self) -> list[MeasuredLink]:
        return await self._inner.links()

    async def aclose(self) -> None:
        await self._inner.aclose()

    def _seen(self, change: Change) -> Change:
        match change:
            case Snapshot(records):
                return replace(change, records=tuple(record for record in records if is_member(self._key, record)))
            case NodeSeen(record) if not is_member(self._key, record):
                return NodeGone(record.node_id)  # it may have been one before
            case _:
                return change


def members_only(directory: Directory, key: SwarmKey | None) -> Directory:
    """What a node or driver of a private swarm reads; all of it where there is no key."""
    return directory if key is None else MembersOnly(directory, key)

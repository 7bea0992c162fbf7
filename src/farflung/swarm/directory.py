"""The port to a directory, and what both of its adapters share: following it through outages.

``records`` and ``watch`` return only what the caller's side has verified itself, whatever the directory says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from farflung.core.errors import DirectoryError
from farflung.core.ids import NodeId
from farflung.swarm.backoff import Backoff
from farflung.swarm.links import MeasuredLink, SignedLinks
from farflung.swarm.records import EVERYTHING, NodeRecord, Query, SignedRecord, SignedWithdrawal

_log = structlog.get_logger(__name__)

_PAUSE_S = 0.05
"""Between polls: changes that come together travel together, and no directory can keep a watcher spinning."""


@dataclass(frozen=True)
class Snapshot:
    """All nodes that fit; forget what you knew. First of a watch, and again where the directory lost track of you.

    ``restarted``: it comes from another run of the directory than what came before, which has to hear of every node anew.
    """

    records: tuple[NodeRecord, ...]
    restarted: bool = False


@dataclass(frozen=True)
class NodeSeen:
    """A node is new or has changed. Mere renewals are not told, so ``kv_free_tokens`` ages."""

    record: NodeRecord


@dataclass(frozen=True)
class NodeGone:
    """A node withdrew, expired, or no longer fits the query."""

    node_id: NodeId


Change = Snapshot | NodeSeen | NodeGone


class Directory(Protocol):
    """Every call raises DirectoryUnreachable where no answer comes within its deadline, and DirectoryError where the
    answer makes no sense."""

    async def announce(self, signed: SignedRecord) -> None:
        """Puts a node's record in, until its ttl is over. Raises RecordRefused, BadSignature."""

    async def withdraw(self, signed: SignedWithdrawal) -> None:
        """Takes a node's record out. Raises RecordRefused, BadSignature."""

    async def records(self, query: Query = EVERYTHING) -> list[NodeRecord]:
        """Live records that fit, with their KV as free as the node last said."""

    def watch(self, query: Query = EVERYTHING) -> AsyncGenerator[Change, None]:
        """A snapshot and then every change, through outages and restarts of the directory, until the caller stops
        (``contextlib.aclosing``).

        Raises UsageError where the directory does not understand the query.
        """

    async def report_links(self, signed: SignedLinks) -> None:
        """Replaces what a node measured. Raises RecordRefused (also where it is not announced), BadSignature."""

    async def links(self) -> list[MeasuredLink]:
        """Links as nodes measured them."""

    async def aclose(self) -> None:
        """Frees connections."""


@dataclass(frozen=True)
class Update:
    """One answer to a watcher: the cursor to ask with next, and changes in order."""

    cursor: str
    changes: tuple[Change, ...]

    def after(self, cursor: str) -> tuple[Change, ...]:
        """The changes, for one who asked with ``cursor``: a snapshot from another run of the directory says so."""
        if not cursor or instance_of(cursor) == instance_of(self.cursor):
            return self.changes
        return tuple(replace(change, restarted=True) if isinstance(change, Snapshot) else change for change in self.changes)


def instance_of(cursor: str) -> str:
    """Which run of a directory a cursor comes from; they read ``instance.revision``."""
    return cursor.partition(".")[0]


async def follow(poll: Callable[[str], Awaitable[Update]], backoff: Backoff, name: str) -> AsyncGenerator[Change, None]:
    """Polls from the last cursor for ever; while the directory fails it waits and tries again, saying so once.

    Args:
        poll: asks from a cursor, empty at first; raises DirectoryError while the directory is away or talks nonsense.
        backoff: waits between failures.
        name: of the directory, for the log.
    """
    cursor, lost = "", False
    while True:
        try:
            update = await poll(cursor)
        except DirectoryError as error:
            if not lost:
                _log.warning("directory lost", directory=name, error=error.message)
            lost = True
            await asyncio.sleep(backoff.next_s())
            continue
        if lost:
            _log.info("directory back", directory=name)
        lost = False
        backoff.reset()
        changes, cursor = update.after(cursor), update.cursor
        for change in changes:
            yield change
        await asyncio.sleep(_PAUSE_S)

"""A directory reached by direct call: inside the gateway, in simulations and in tests. It runs on any event loop's clock.

What the service keeps it has verified in this process, so it is not verified twice.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from random import Random

from farflung.core.errors import DirectoryUnreachable
from farflung.swarm.backoff import Backoff, BackoffConfig
from farflung.swarm.directory import Change, NodeGone, NodeSeen, Snapshot, Update, follow
from farflung.swarm.links import MeasuredLink, SignedLinks, measured_links
from farflung.swarm.records import EVERYTHING, NodeRecord, Query, SignedRecord, SignedWithdrawal
from farflung.swarm.service import DirectoryService

_WAIT_S = 25.0


class MemoryDirectory:
    """One client's view of ``service``.

    Attributes:
        reachable: False cuts this client off, for simulations of outages; the service goes on.
    """

    def __init__(self, service: DirectoryService, random: Random, backoff: BackoffConfig | None = None) -> None:
        self.reachable = True
        self._service = service
        self._random = random
        self._backoff = backoff or BackoffConfig()

    async def announce(self, signed: SignedRecord) -> None:
        self._reach().announce(signed)

    async def withdraw(self, signed: SignedWithdrawal) -> None:
        self._reach().withdraw(signed)

    async def records(self, query: Query = EVERYTHING) -> list[NodeRecord]:
        return [entry.record for entry in self._reach().entries(query)]

    def watch(self, query: Query = EVERYTHING) -> AsyncGenerator[Change, None]:
        async def poll(cursor: str) -> Update:
            page = await self._reach().poll(query, cursor, _WAIT_S)
            self._reach()  # cut while waiting: the answer never came
            records = tuple(entry.record for entry in page.batch.entries)
            if page.batch.snapshot:
                return Update(page.cursor, (Snapshot(records),))
            return Update(page.cursor, (*map(NodeGone, page.batch.gone), *map(NodeSeen, records)))

        return follow(poll, Backoff(self._backoff, self._random), "memory")

    async def report_links(self, signed: SignedLinks) -> None:
        self._reach().report_links(signed)

    async def links(self) -> list[MeasuredLink]:
        return measured_links(report for _, report in self._reach().link_reports())

    async def aclose(self) -> None:
        self.reachable = False

    def _reach(self) -> DirectoryService:
        if not self.reachable:
            raise DirectoryUnreachable("the directory in memory is cut off", hint="set reachable to join again")
        return self._service

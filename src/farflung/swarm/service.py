"""The directory itself, whatever stands before it: checks what nodes say, keeps it, wakes those who watch.

It needs no task of its own: whoever calls first after a record's time is over finds it expired, and watchers wait no
longer than until the next one can expire.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from farflung.core.errors import DirectoryError, DirectoryUnreachable, RecordRefused
from farflung.core.ids import short
from farflung.identity.swarm_key import SwarmKey
from farflung.swarm.links import LinkReport, LinkTable, SignedLinks, open_links
from farflung.swarm.members import check_member
from farflung.swarm.records import EVERYTHING, Query, SignedRecord, SignedWithdrawal, open_record, open_withdrawal
from farflung.swarm.table import Batch, Entry, Table, TableChange, TableConfig

WallClock = Callable[[], float]
"""Seconds since 1970, e.g. ``time.time``; used only for what is signed."""


@dataclass(frozen=True)
class ServiceConfig:
    """Limits of a directory.

    Attributes:
        instance: tells this run of the directory from the next: revisions start anew with it. Empty: random.
        table: bounds of what is kept.
        max_watchers: watchers waiting at a time; None: two for each node there may be, of which one is its own.
        longest_wait_s: a watcher is answered at least this often.
        swarm_key: only members' records are taken.
    """

    instance: str = ""
    table: TableConfig = field(default_factory=TableConfig)
    max_watchers: int | None = None
    longest_wait_s: float = 30.0
    swarm_key: SwarmKey | None = None

    @property
    def most_watchers(self) -> int:
        """``max_watchers``, or what follows from the table's ``max_nodes``."""
        return 2 * self.table.max_nodes if self.max_watchers is None else self.max_watchers


@dataclass(frozen=True)
class Page:
    """What a watcher gets, and the cursor to ask with next."""

    cursor: str
    batch: Batch


class DirectoryService:
    """See the module. Monotonic time is the running loop's; ``wall_clock`` judges times of issue."""

    def __init__(
        self, config: ServiceConfig, wall_clock: WallClock, random_bytes: Callable[[int], bytes] = secrets.token_bytes
    ) -> None:
        self._config = config
        self._wall_clock = wall_clock
        self._instance = config.instance or random_bytes(8).hex()
        self._table = Table(config.table)
        self._links = LinkTable()
        self._waiting: dict[Query, dict[asyncio.Future[None], None]] = {}  # by query: a stage's nodes share one
        self._closed = False

    @property
    def nodes(self) -> int:
        """How many are here."""
        self._expire()
        return len(self._table)

    @property
    def watchers(self) -> int:
        """How many wait for a change."""
        return sum(map(len, self._waiting.values()))

    def announce(self, signed: SignedRecord) -> None:
        """Raises RecordRefused, BadSignature."""
        record = open_record(signed, self._wall_clock())
        if self._config.swarm_key is not None:
            check_member(self._config.swarm_key, record)
        self._expire()
        self._tell(self._table.put(signed, record, _now_s()))

    def withdraw(self, signed: SignedWithdrawal) -> None:
        """Raises RecordRefused, BadSignature."""
        withdrawal = open_withdrawal(signed, self._wall_clock())
        self._expire()
        self._tell(self._table.withdraw(withdrawal, _now_s()))

    def entries(self, query: Query = EVERYTHING) -> tuple[Entry, ...]:
        """Live records that fit."""
        self._expire()
        return self._table.entries(query)

    async def poll(self, query: Query, cursor: str, wait_s: float) -> Page:
        """What changed after ``cursor``, at once if anything did, else as soon as something does.

        After ``wait_s`` (at most ``longest_wait_s``), or when the directory closes, it returns with nothing. A cursor that
        is empty, unknown or too old gets a snapshot. Raises DirectoryError where too many watch, DirectoryUnreachable once
        it has closed.
        """
        if self._closed:
            raise DirectoryUnreachable("the directory is closing", hint="try again later")
        deadline_s = _now_s() + min(wait_s, self._config.longest_wait_s)
        revision = self._revision_of(cursor)
        while True:
            self._expire()
            batch = self._table.since(revision, query)
            if batch.is_news or self._closed or _now_s() >= deadline_s:
                return Page(f"{self._instance}.{batch.revision}", batch)
            revision = batch.revision
            await self._change(query, min(deadline_s, self._table.next_expiry_s))

    def report_links(self, signed: SignedLinks) -> None:
        """Raises RecordRefused, BadSignature."""
        report = open_links(signed, self._wall_clock())
        self._expire()
        if report.node_id not in self._table:
            raise RecordRefused(
                f"node {short(report.node_id)} reports links and is not in the directory", hint="announce a record first"
            )
        self._links.put(signed, report, _now_s())

    def link_reports(self) -> list[tuple[SignedLinks, LinkReport]]:
        """Reports that hold."""
        self._expire()
        return self._links.live(_now_s())

    def close(self) -> None:
        """Answers all who wait; nobody waits after it."""
        self._closed = True
        self._wake(list(self._waiting))

    def _expire(self) -> None:
        self._tell(self._table.expire(_now_s()))

    def _tell(self, changes: tuple[TableChange, ...]) -> None:
        for change in changes:
            if change.after is None and change.before is not None:
                self._links.drop(change.before.node_id)
            self._wake([query for query in self._waiting if change.concerns(query)])

    def _wake(self, queries: Iterable[Query]) -> None:
        for query in queries:
            for future in self._waiting.pop(query):
                if not future.done():
                    future.set_result(None)

    async def _change(self, query: Query, until_s: float) -> None:
        """Returns at the next change that concerns ``query``, at the latest at ``until_s``."""
        if self.watchers >= self._config.most_watchers:
            raise DirectoryError(f"the directory has {self.watchers} watchers already", hint="try again later")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(query, {})[future] = None
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until_s):
                    await future
        finally:
            waiting = self._waiting.get(query, {})
            waiting.pop(future, None)
            if not waiting:
                self._waiting.pop(query, None)

    def _revision_of(self, cursor: str) -> int | None:
        instance, _, number = cursor.partition(".")
        if instance != self._instance or not number.isdecimal() or len(number) > 18:
            return None
        return int(number)


def _now_s() -> float:
    return asyncio.get_running_loop().time()

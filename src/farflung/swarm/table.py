"""The directory's state: who is here, since when, and what changed since a given revision. No I/O, no clock of its own.

- A record goes in only if its sequence is greater than the last one known of that node. Sequences outlive their records
  by ``memory_s``; after that a replay is too old by its own time of issue (``signed.MAX_TTL_S`` + both skews), so it is
  refused for good.
- Every change takes a new revision; a renewal does not. What a watcher missed is not a log of events but the present
  state of all that changed: each node comes once, as it is now. Departures are remembered in a bounded history; who is
  further behind gets everything anew.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from farflung.core.errors import RecordRefused
from farflung.core.ids import NodeId, short
from farflung.swarm.records import NodeRecord, Query, SignedRecord, Withdrawal
from farflung.swarm.signed import MAX_SKEW_S, MAX_TTL_S


@dataclass(frozen=True)
class TableConfig:
    """Bounds of a table.

    Attributes:
        max_nodes: nodes at a time; a record (with its keys and copies) takes some 4 KB.
        max_history: departures that watchers can be told of.
        max_remembered: departed nodes whose sequence is kept; beyond it the longest departed are forgotten first.
        memory_s: how long it is kept.
    """

    max_nodes: int = 10_000
    max_history: int = 4_096
    max_remembered: int = 20_000
    memory_s: float = MAX_TTL_S + 2 * MAX_SKEW_S


@dataclass(frozen=True)
class Entry:
    """A live record. ``revision`` is that of its last change, ``expires_s`` a time of the caller's monotonic clock."""

    signed: SignedRecord
    record: NodeRecord
    revision: int
    expires_s: float


@dataclass(frozen=True)
class TableChange:
    """A node before and after one change; None where it was or is not here."""

    before: NodeRecord | None
    after: NodeRecord | None

    def concerns(self, query: Query) -> bool:
        """Whether a watcher with ``query`` sees anything of it."""
        return any(record is not None and query.matches(record) for record in (self.before, self.after))


@dataclass(frozen=True)
class Batch:
    """What a watcher needs to be up to date.

    Attributes:
        revision: it is then.
        snapshot: ``entries`` are all there are; forget what you knew.
        entries: nodes that are new or changed, in order of change.
        gone: nodes that left, or no longer fit the query.
    """

    revision: int
    snapshot: bool
    entries: tuple[Entry, ...] = ()
    gone: tuple[NodeId, ...] = ()

    @property
    def is_news(self) -> bool:
        return self.snapshot or bool(self.entries or self.gone)


@dataclass(frozen=True)
class _Departure:
    revision: int
    before: NodeRecord


class Table:
    """See the module. All times are seconds of one monotonic clock and never go back."""

    def __init__(self, config: TableConfig | None = None) -> None:
        self._config = config or TableConfig()
        self._entries: dict[NodeId, Entry] = {}  # in order of their last change: renewals keep the place
        self._departures: deque[_Departure] = deque()
        self._sequences: dict[NodeId, tuple[int, float]] = {}  # of departed nodes, with the time to forget it; oldest first
        self._revision = 0
        self._history_from = 0
        self._next_expiry_s = math.inf

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, node_id: NodeId) -> bool:
        return node_id in self._entries

    @property
    def revision(self) -> int:
        return self._revision

    @property
    def next_expiry_s(self) -> float:
        """No record expires before this time (it may be early, never late)."""
        return self._next_expiry_s

    def put(self, signed: SignedRecord, record: NodeRecord, now_s: float) -> tuple[TableChange, ...]:
        """Takes in a record that was opened; empty where it is a renewal. Expire first.

        Raises RecordRefused where its sequence is not newer, or the node is new and the table is full.
        """
        self._check_sequence(record.node_id, record.sequence)
        known = self._entries.get(record.node_id)
        if known is None and len(self._entries) >= self._config.max_nodes:
            raise RecordRefused(
                f"the directory is full: it keeps {self._config.max_nodes} nodes",
                hint="use another directory, or ask its operator for more room",
            )
        self._sequences.pop(record.node_id, None)
        expires_s = now_s + record.ttl_s
        self._next_expiry_s = min(self._next_expiry_s, expires_s)
        if known is not None and known.record.same_but_for_renewal(record):
            self._entries[record.node_id] = Entry(signed, record, known.revision, expires_s)
            return ()
        self._revision += 1
        if known is not None:
            del self._entries[record.node_id]
            if not known.record.same_place(record):
                self._remember_departure(known.record)  # for watchers whom only its former self concerned
        self._entries[record.node_id] = Entry(signed, record, self._revision, expires_s)
        return (TableChange(None if known is None else known.record, record),)

    def withdraw(self, withdrawal: Withdrawal, now_s: float) -> tuple[TableChange, ...]:
        """Takes a node out. Raises RecordRefused where its sequence is not newer."""
        self._check_sequence(withdrawal.node_id, withdrawal.sequence)
        if withdrawal.node_id in self._sequences:
            self._sequences[withdrawal.node_id] = (withdrawal.sequence, self._sequences[withdrawal.node_id][1])
        if withdrawal.node_id not in self._entries:
            return ()  # who was never here is not remembered: anybody can make keys and withdraw them
        return (self._remove(withdrawal.node_id, withdrawal.sequence, now_s),)

    def expire(self, now_s: float) -> tuple[TableChange, ...]:
        """Takes out every record whose time is over."""
        while self._sequences and next(iter(self._sequences.values()))[1] <= now_s:
            del self._sequences[next(iter(self._sequences))]
        if now_s < self._next_expiry_s:
            return ()
        over = [entry.record for entry in self._entries.values() if entry.expires_s <= now_s]
        changes = tuple(self._remove(record.node_id, record.sequence, now_s) for record in over)
        self._next_expiry_s = min((entry.expires_s for entry in self._entries.values()), default=math.inf)
        return changes

    def entries(self, query: Query) -> tuple[Entry, ...]:
        """All live records that fit, in order of their last change."""
        return tuple(entry for entry in self._entries.values() if query.matches(entry.record))

    def since(self, revision: int | None, query: Query) -> Batch:
        """What changed after ``revision``; everything, where that is None, too long ago or of another table."""
        if revision is None or not self._history_from <= revision <= self._revision:
            return Batch(self._revision, snapshot=True, entries=self.entries(query))
        changed: list[Entry] = []
        for entry in reversed(self._entries.values()):
            if entry.revision <= revision:
                break
            if query.matches(entry.record):
                changed.append(entry)
        gone: dict[NodeId, None] = {}
        for departure in reversed(self._departures):
            if departure.revision <= revision:
                break
            now = self._entries.get(departure.before.node_id)
            if query.matches(departure.before) and not (now and query.matches(now.record)):
                gone[departure.before.node_id] = None
        return Batch(self._revision, snapshot=False, entries=tuple(reversed(changed)), gone=tuple(gone))

    def _check_sequence(self, node_id: NodeId, sequence: int) -> None:
        entry = self._entries.get(node_id)
        known = entry.record.sequence if entry else self._sequences.get(node_id, (-1, 0.0))[0]
        if sequence <= known:
            raise RecordRefused(
                f"record {sequence} of node {short(node_id)} is not newer than {known}, which is known",
                hint="if it is yours: does another process use the same key, or was the clock set back?",
            )

    def _remove(self, node_id: NodeId, sequence: int, now_s: float) -> TableChange:
        record = self._entries.pop(node_id).record
        self._revision += 1
        self._remember_departure(record)
        self._sequences[node_id] = (sequence, now_s + self._config.memory_s)
        if len(self._sequences) > self._config.max_remembered:
            del self._sequences[next(iter(self._sequences))]
        return TableChange(record, None)

    def _remember_departure(self, before: NodeRecord) -> None:
        self._departures.append(_Departure(self._revision, before))
        if len(self._departures) > self._config.max_history:
            self._history_from = self._departures.popleft().revision

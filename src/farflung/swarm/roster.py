"""The nodes of a model as they are now: a directory's watch, kept as a table. Nodes and drivers find addresses in it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType

from farflung.core.errors import DeadlineExceeded, DirectoryUnreachable, FarflungError, Unreachable
from farflung.core.ids import NodeId, short
from farflung.swarm.directory import Change, Directory, NodeGone, NodeSeen, Snapshot
from farflung.swarm.records import EVERYTHING, NodeRecord, Query


class Roster:
    """``async with Roster(directory, query) as roster``: follows the directory from entry to exit.

    While the directory is away the last known nodes stay: better an old address than none. A record older than one seen
    before never replaces it.
    """

    def __init__(self, directory: Directory, query: Query = EVERYTHING) -> None:
        self._directory = directory
        self._query = query
        self._records: dict[NodeId, NodeRecord] = {}
        self._changed = asyncio.Event()
        self._heard = False
        self._error: FarflungError | None = None

    async def __aenter__(self) -> Roster:
        self._task = asyncio.create_task(self._follow(), name="roster")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.result()

    @property
    def records(self) -> tuple[NodeRecord, ...]:
        """Nodes as last heard of, by node id. Their free KV ages: renewals are not told."""
        return tuple(self._records[node_id] for node_id in sorted(self._records))

    def get(self, node_id: NodeId) -> NodeRecord | None:
        """The node's record; None where it is not here now."""
        return self._records.get(node_id)

    async def find(self, node_id: NodeId, timeout_s: float) -> NodeRecord:
        """The node's record, waiting for it to appear.

        Raises Unreachable where it does not within ``timeout_s``, DirectoryUnreachable where the directory never answered.
        """
        try:
            await self.until(lambda _: node_id in self._records, timeout_s)
        except DeadlineExceeded as error:
            raise Unreachable(
                f"node {short(node_id)} is not in the directory, and did not appear within {timeout_s:g} s",
                hint="is the node running, with the same --directory?",
            ) from error
        return self._records[node_id]

    async def until(self, enough: Callable[[Sequence[NodeRecord]], bool], timeout_s: float) -> tuple[NodeRecord, ...]:
        """The records, as soon as ``enough`` says so of them.

        Raises DeadlineExceeded after ``timeout_s``, DirectoryUnreachable where the directory never answered until then.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not (self._heard and enough(self.records)):
                    if self._error is not None:
                        raise self._error
                    await self._changed.wait()
        except TimeoutError as error:
            if not self._heard:
                raise DirectoryUnreachable(
                    f"the directory gave no answer within {timeout_s:g} s", hint="is it running at the URL given?"
                ) from error
            raise DeadlineExceeded(
                f"after {timeout_s:g} s the nodes waited for are not all here; {len(self._records)} are"
            ) from error
        return self.records

    async def _follow(self) -> None:
        try:
            async with contextlib.aclosing(self._directory.watch(self._query)) as changes:
                async for change in changes:
                    self._apply(change)
                    self._tell()
        except FarflungError as error:
            self._error = error
            self._tell()

    def _apply(self, change: Change) -> None:
        self._heard = True
        match change:
            case Snapshot(records):
                known, self._records = self._records, {}
                for record in records:
                    self._records[record.node_id] = _newer(known.get(record.node_id), record)
            case NodeSeen(record):
                self._records[record.node_id] = _newer(self._records.get(record.node_id), record)
            case NodeGone(node_id):
                self._records.pop(node_id, None)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _newer(known: NodeRecord | None, record: NodeRecord) -> NodeRecord:
    return known if known is not None and known.sequence > record.sequence else record

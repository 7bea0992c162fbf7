"""The nodes of a model as they are now: a directory's watch, kept as a table. Nodes and drivers find addresses in it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from farflung.core.errors import DeadlineExceeded, DirectoryUnreachable, Unreachable
from farflung.core.ids import NodeId, short
from farflung.swarm.background import Background
from farflung.swarm.directory import Change, Directory, NodeGone, NodeSeen, Snapshot
from farflung.swarm.records import EVERYTHING, NodeRecord, Query


class Roster(Background):
    """``async with Roster(directory, query) as roster``: follows the directory from entry to exit.

    While the directory is away the last known nodes stay: better an old address than none. After it restarted they stay for
    another ttl of theirs, within which those that live announce themselves again. A record older than one seen before never
    replaces it.
    """

    def __init__(self, directory: Directory, query: Query = EVERYTHING) -> None:
        super().__init__("roster")
        self._directory = directory
        self._query = query
        self._records: dict[NodeId, NodeRecord] = {}
        self._leaving: dict[NodeId, asyncio.TimerHandle] = {}  # of those that a restarted directory has not heard of yet
        self._changed = asyncio.Event()
        self._heard = False

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
                    if self.has_ended:
                        await self.ended()  # raises why
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

    async def _run(self) -> None:
        try:
            async with contextlib.aclosing(self._directory.watch(self._query)) as changes:
                async for change in changes:
                    self._heard = True
                    self._apply(change)
                    self._tell()
        finally:
            for timer in self._leaving.values():
                timer.cancel()
            self._tell()

    def _apply(self, change: Change) -> None:
        match change:
            case Snapshot(records, restarted):
                here = {record.node_id for record in records}
                for node_id in [known for known in self._records if known not in here]:
                    if restarted:
                        self._let_go_later(node_id)
                    elif node_id not in self._leaving:
                        del self._records[node_id]
                for record in records:
                    self._see(record)
            case NodeSeen(record):
                self._see(record)
            case NodeGone(node_id):
                self._forget(node_id)

    def _see(self, record: NodeRecord) -> None:
        known = self._records.get(record.node_id)
        self._forget(record.node_id)
        self._records[record.node_id] = known if known is not None and known.sequence > record.sequence else record

    def _forget(self, node_id: NodeId) -> None:
        self._records.pop(node_id, None)
        if timer := self._leaving.pop(node_id, None):
            timer.cancel()

    def _let_go_later(self, node_id: NodeId) -> None:
        if node_id not in self._leaving:  # a second restart gives no second ttl
            ttl_s = self._records[node_id].ttl_s
            self._leaving[node_id] = asyncio.get_running_loop().call_later(ttl_s, self._let_go, node_id)

    def _let_go(self, node_id: NodeId) -> None:
        self._forget(node_id)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

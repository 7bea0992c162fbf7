"""The compute loop: one packed step at a time over whatever waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from farflung.core.errors import ProtocolViolation
from farflung.core.ids import SessionId
from farflung.core.messages import MAX_DECODE_ROWS
from farflung.engine.backend import StageBackend
from farflung.node.scheduling import Pace, Waiting, choose_batch
from farflung.node.stage_session import StageSession
from farflung.node.table import SessionTable
from farflung.protocol.stage_state import PendingWindow


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How steps are filled.

    Attributes:
        pace: see ``choose_batch``.
        decoding_s: a session that decoded so lately is expected to do so again.
    """

    pace: Pace = field(default_factory=Pace)
    decoding_s: float = 3.0

    def with_curve(self, curve_ms: Mapping[int, float]) -> ComputeConfig:
        """Paced by a measured T-curve, milliseconds by rows."""
        return replace(self, pace=replace(self.pace, curve_ms=tuple(sorted(curve_ms.items()))))


async def compute_forever(table: SessionTable, backend: StageBackend, config: ComputeConfig) -> None:
    """Steps while sessions have windows, sleeps while none has. Ends only by cancellation or a failure of the whole backend.

    Raises FarflungError where a step fails as a whole: the node can no longer serve.
    """
    loop = asyncio.get_running_loop()
    decoding = Decoding(config.decoding_s)
    while True:
        await table.wake.wait()
        ready = {session.id: session for session in table.ready_sessions}
        waiting = [_waiting(session, pending) for session in ready.values() if (pending := session.state.ready) is not None]
        if not waiting:
            table.wake.clear()
            continue
        decoding.seen(waiting, loop.time())
        chosen = choose_batch(waiting, config.pace, decoding.rows)
        batch = [ready[choice.session] for choice in chosen]
        for session in batch:
            table.taken(session)
        work = [session.start_step(choice.rows) for session, choice in zip(batch, chosen, strict=True)]
        report = await backend.step(work)
        if len(report.results) != len(batch):
            raise ProtocolViolation(f"the backend returned {len(report.results)} results for {len(batch)} windows")
        queue_rows = table.queue_rows - sum(session.state.queue[0].window.rows for session in batch if not session.over)
        step_rows = sum(run.count for item in work for run in item.runs)
        for session, result in zip(batch, report.results, strict=True):
            session.finish_step(result, report.compute_s * 1e3, step_rows, queue_rows)


class Decoding:
    """Remembers for ``memory_s`` seconds how many rows interactive sessions decode at a time."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._last: dict[SessionId, tuple[int, float]] = {}  # rows, when; oldest first

    def seen(self, waiting: Iterable[Waiting], now_s: float) -> None:
        """What waits now."""
        for item in waiting:
            if item.is_decode and not item.is_batch:
                self._last.pop(item.session, None)
                self._last[item.session] = item.rows, now_s
        while self._last and now_s - next(iter(self._last.values()))[1] > self._memory_s:
            del self._last[next(iter(self._last))]

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self._last.values())


def _waiting(session: StageSession, pending: PendingWindow) -> Waiting:
    window = pending.window
    return Waiting(
        session.id,
        window.rows,
        is_decode=window.rows <= MAX_DECODE_ROWS and (window.is_decode or not pending.is_splittable),
        is_batch=session.opening.text.batch,
        is_whole=not pending.is_splittable,
    )

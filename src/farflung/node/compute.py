"""The compute loop: one packed step at a time over whatever waits."""

from __future__ import annotations

from dataclasses import dataclass

from farflung.core.errors import ProtocolViolation
from farflung.engine.backend import StageBackend
from farflung.node.scheduling import Waiting, choose_batch
from farflung.node.stage_session import StageSession
from farflung.node.table import SessionTable


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """``max_step_rows``: see ``choose_batch``."""

    max_step_rows: int = 256


async def compute_forever(table: SessionTable, backend: StageBackend, config: ComputeConfig) -> None:
    """Steps while sessions have windows, sleeps while none has. Ends only by cancellation or a failure of the whole backend.

    Raises FarflungError where a step fails as a whole: the node can no longer serve.
    """
    while True:
        await table.wake.wait()
        batch = _batch(table.ready_sessions, config)
        if not batch:
            table.wake.clear()
            continue
        for session in batch:
            table.taken(session)
        report = await backend.step([session.start_step() for session in batch])
        if len(report.results) != len(batch):
            raise ProtocolViolation(f"the backend returned {len(report.results)} results for {len(batch)} windows")
        queue_rows = table.queue_rows - sum(session.state.queue[0].window.rows for session in batch if not session.over)
        for session, result in zip(batch, report.results, strict=True):
            session.finish_step(result, report.compute_s * 1e3, queue_rows)


def _batch(sessions: list[StageSession], config: ComputeConfig) -> list[StageSession]:
    by_id = {session.id: session for session in sessions}
    return [by_id[chosen] for chosen in choose_batch(_waiting(sessions), config.max_step_rows)]


def _waiting(sessions: list[StageSession]) -> list[Waiting]:
    found = []
    for session in sessions:
        pending = session.state.ready
        if pending is not None:
            found.append(Waiting(session.id, pending.window.rows, pending.window.is_decode))
    return found

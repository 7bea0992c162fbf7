"""A real backend whose steps take time by a T-curve on the loop's clock, and who keeps a record of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from farflung.core.ids import SessionId
from farflung.core.model import LayerRange, ModelSpec
from farflung.engine.backend import SessionSpec, StageBackend, StageWork, StepReport
from farflung.planning.curve import time_ms


@dataclass(frozen=True)
class Step:
    """When a step began and ended, and how many rows of each session it computed."""

    start_s: float
    stop_s: float
    rows: dict[SessionId, int]


class TimedBackend:
    """See ``StageBackend``; the work itself is done at once, at the end of the step's time."""

    def __init__(self, inner: StageBackend, curve_ms: Sequence[tuple[int, float]]) -> None:
        self._inner = inner
        self._curve_ms = curve_ms
        self.steps: list[Step] = []

    @property
    def spec(self) -> ModelSpec:
        return self._inner.spec

    @property
    def layers(self) -> LayerRange:
        return self._inner.layers

    @property
    def engine_class(self) -> str:
        return self._inner.engine_class

    @property
    def kv_tokens(self) -> int:
        return self._inner.kv_tokens

    @property
    def kv_free_tokens(self) -> int:
        return self._inner.kv_free_tokens

    def open(self, spec: SessionSpec) -> None:
        self._inner.open(spec)

    def close(self, session: SessionId) -> None:
        self._inner.close(session)

    async def step(self, work: Sequence[StageWork]) -> StepReport:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        rows = {item.session: sum(run.count for run in item.runs) for item in work}
        await asyncio.sleep(time_ms(self._curve_ms, max(1, sum(rows.values()))) / 1e3)
        report = await self._inner.step(work)
        self.steps.append(Step(start_s, loop.time(), rows))
        return replace(report, compute_s=loop.time() - start_s)

    async def aclose(self) -> None:
        await self._inner.aclose()

"""Three stages in one process, and what they must compute like the whole model in, for any family."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from farflung.core.ids import SessionId
from farflung.core.model import LayerRange
from farflung.core.sampling import SamplingOptions
from farflung.core.window import Commit, SlotRun, spans_of
from farflung.engine.backend import SessionSpec, StageWork
from farflung.engine.safetensors_source import SafetensorsSource
from farflung.engine.torch_backend import BackendConfig, TorchBackend, load_backend

A, B = SessionId("a" * 32), SessionId("b" * 32)

Reference = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [tokens] to the whole model's logits [tokens, vocabulary]."""


class Ring:
    """Stages that hand rows on as they would over links; keeps the logits of every wanted slot."""

    def __init__(self, source: Any, split: Sequence[LayerRange], kv_tokens: int = 600) -> None:
        self.logits: dict[tuple[SessionId, int], torch.Tensor] = {}
        config = BackendConfig(kv_tokens=kv_tokens, on_logits=self._keep)
        self.stages: list[TorchBackend] = [load_backend(source, layers, torch.float32, config) for layers in split]

    @classmethod
    def of_folder(cls, path: Path, layers: int, kv_tokens: int = 600) -> Ring:
        """Three stages of a saved model."""
        cuts = [0, layers // 3, 2 * layers // 3, layers]
        return cls(SafetensorsSource.of_folder(path), [LayerRange(*pair) for pair in pairwise(cuts)], kv_tokens)

    def _keep(self, session: SessionId, slots: tuple[int, ...], logits: torch.Tensor) -> None:
        self.logits.update(zip(((session, slot) for slot in slots), logits.clone(), strict=True))

    def open(self, session: SessionId, lease: int = 120, context: int = 0) -> None:
        for stage in self.stages:
            spec = SessionSpec(
                session=session, lease_tokens=lease, sampling=SamplingOptions(), codec="fp32", context_tokens=context
            )
            stage.open(spec)

    def close(self) -> None:
        for stage in self.stages:
            stage.close(A)
            stage.close(B)

    async def step(self, *work: StageWork) -> None:
        """One packed step through all stages; all new slots are wanted."""
        rows: list[bytes | None] = [None] * len(work)
        for stage in self.stages:
            items = [
                StageWork(
                    session=item.session,
                    runs=item.runs,
                    commit=item.commit,
                    token_ids=item.token_ids if stage is self.stages[0] else None,
                    rows=coded,
                    want=tuple(slot for run in item.runs for slot, _ in run.pairs()) if stage is self.stages[-1] else (),
                )
                for item, coded in zip(work, rows, strict=True)
            ]
            report = await stage.step(items)
            for result in report.results:
                if result.error is not None:
                    raise result.error
            rows = [None if result.rows is None else bytes(result.rows) for result in report.results]

    def error(self, session: SessionId, slots: Sequence[int], reference: torch.Tensor) -> float:
        """Largest difference to ``reference`` [slots, vocabulary], of its largest value."""
        found = torch.stack([self.logits[session, slot] for slot in slots])
        return ((found - reference).abs().max() / reference.abs().max()).item()


def path_work(session: SessionId, ids: torch.Tensor, start: int, stop: int) -> StageWork:
    """Positions ``start`` to ``stop`` of a text, slot = position, committed at once as prompts and plain decoding are."""
    return StageWork(
        session=session,
        runs=(SlotRun(start, stop - start, start - 1),),
        commit=Commit(start, spans_of(range(start, stop))),
        token_ids=as_ids(ids[start:stop]),
    )


def tree_work(runs: Sequence[SlotRun], ids: torch.Tensor, commit: Commit | None = None) -> StageWork:
    """New slots of session A."""
    return StageWork(session=A, runs=tuple(runs), commit=commit, token_ids=as_ids(ids))


def as_ids(ids: torch.Tensor) -> Any:
    return ids.numpy().astype(np.int32)


def text(tokens: int, seed: int, vocabulary: int = 320) -> torch.Tensor:
    return torch.randint(3, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))


async def one_prompt(ring: Ring, whole: Reference) -> float:
    """At once, then ten tokens one by one."""
    return await _in_chunks(ring, whole, (50, *[1] * 10))


async def chunked_prefill(ring: Ring, whole: Reference) -> float:
    return await _in_chunks(ring, whole, (7, 20, 1, 32))


async def _in_chunks(ring: Ring, whole: Reference, chunks: Sequence[int]) -> float:
    ids = text(60, seed=1)
    ring.open(A)
    start = 0
    for count in chunks:
        await ring.step(path_work(A, ids, start, start + count))
        start += count
    return ring.error(A, range(60), whole(ids))


async def two_packed(ring: Ring, whole: Reference) -> float:
    """Two sessions of different lengths; B crosses a sliding window of 16 while A is beyond it."""
    ids_a, ids_b = text(48, seed=3), text(24, seed=4)
    ring.open(A)
    ring.open(B)
    await ring.step(path_work(A, ids_a, 0, 34))
    await ring.step(path_work(B, ids_b, 0, 11), path_work(A, ids_a, 34, 35))
    for step in range(12):
        await ring.step(path_work(A, ids_a, 35 + step, 36 + step), path_work(B, ids_b, 11 + step, 12 + step))
    await ring.step(path_work(A, ids_a, 47, 48))
    await ring.step(path_work(B, ids_b, 23, 24))
    return max(ring.error(A, range(48), whole(ids_a)), ring.error(B, range(24), whole(ids_b)))


async def tree(ring: Ring, whole: Reference) -> float:
    """Branches under a prompt, each as if alone; then commits, rollbacks and plain decoding on what is left."""
    prompt, left, right, more = text(30, seed=5), text(4, seed=6), text(3, seed=7), text(6, seed=8)
    errors: list[float] = []

    def compare(slots: Sequence[int], ids: torch.Tensor) -> None:
        errors.append(ring.error(A, slots, whole(ids)[-len(slots) :]))

    ring.open(A)
    await ring.step(path_work(A, prompt, 0, 30))
    runs = (SlotRun(30, 4, 29), SlotRun(34, 3, 29), SlotRun(37, 2, 31))
    await ring.step(tree_work(runs, torch.cat([left, right, more[:2]])))
    compare(range(30, 34), torch.cat([prompt, left]))
    compare(range(34, 37), torch.cat([prompt, right]))
    compare((30, 31, 37, 38), torch.cat([prompt, left[:2], more[:2]]))
    await ring.step(tree_work([SlotRun(39, 2, 38)], more[2:4]))
    compare((30, 31, 37, 38, 39, 40), torch.cat([prompt, left[:2], more[:4]]))
    await ring.step(tree_work([SlotRun(41, 3, 37)], right, Commit(30, spans_of([30, 31, 37]))))
    grown = torch.cat([prompt, left[:2], more[:1], right])
    compare((30, 31, 37, 41, 42, 43), grown)
    tail = text(8, seed=9)
    for index in range(8):
        commit = Commit(33, spans_of(range(41, 44 + index)))
        await ring.step(tree_work([SlotRun(44 + index, 1, 43 + index)], tail[index : index + 1], commit))
    compare(range(44, 52), torch.cat([grown, tail]))
    return max(errors)


CASES: dict[str, Callable[[Ring, Reference], Awaitable[float]]] = {
    "prompt": one_prompt,
    "chunked": chunked_prefill,
    "packed": two_packed,
    "tree": tree,
}


def errors_of(ring: Ring, whole: Reference) -> dict[str, float]:
    """Largest relative error of every case. The ring is spent afterwards."""

    async def run() -> dict[str, float]:
        found: dict[str, float] = {}
        try:
            for name, case in CASES.items():
                ring.logits.clear()
                found[name] = await case(ring, whole)
                ring.close()
        finally:
            for stage in ring.stages:
                await stage.aclose()
        return found

    return asyncio.run(run())

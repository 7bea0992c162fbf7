"""A model split in three stages computes what the whole model computes: fp32 weights, fp32 codec, 1e-5 of the largest logit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, VOCABULARY, tiny_model, whole_model

from farflung.core.ids import SessionId
from farflung.core.model import LayerRange
from farflung.core.sampling import SamplingOptions
from farflung.core.window import NO_SLOT, Commit, SlotRun, spans_of
from farflung.engine.backend import SessionSpec, StageWork
from farflung.engine.safetensors_source import SafetensorsSource
from farflung.engine.segments import BLOCK_ROWS
from farflung.engine.torch_backend import BackendConfig, TorchBackend, load_backend

TOLERANCE = 1e-5
SPLIT = (LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6))
A, B = SessionId("a" * 32), SessionId("b" * 32)
KV_TOKENS = 2 * BLOCK_ROWS + 64


class Ring:
    """Three stages in one process, handing rows on as they would over links; keeps the logits of every wanted slot."""

    def __init__(self, path: Path) -> None:
        self.logits: dict[tuple[SessionId, int], torch.Tensor] = {}
        source = SafetensorsSource.of_folder(path)
        config = BackendConfig(kv_tokens=KV_TOKENS, on_logits=self._keep)
        self.stages: list[TorchBackend] = [load_backend(source, layers, torch.float32, config) for layers in SPLIT]

    def _keep(self, session: SessionId, slots: tuple[int, ...], logits: torch.Tensor) -> None:
        self.logits.update(zip(((session, slot) for slot in slots), logits, strict=True))

    def open(self, session: SessionId, lease: int = 120) -> None:
        for stage in self.stages:
            stage.open(SessionSpec(session=session, lease_tokens=lease, sampling=SamplingOptions(), codec="fp32"))

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
            rows = [result.rows for result in report.results]

    def error(self, session: SessionId, slots: Sequence[int], reference: torch.Tensor) -> float:
        """Largest difference to ``reference`` [slots, vocab], of its largest value."""
        found = torch.stack([self.logits[session, slot] for slot in slots])
        return ((found - reference).abs().max() / reference.abs().max()).item()


def path_work(session: SessionId, ids: torch.Tensor, start: int, stop: int) -> StageWork:
    """Positions ``start`` to ``stop`` of a text, slot = position, committed at once as prompts and plain decoding are."""
    return StageWork(
        session=session,
        runs=(SlotRun(start, stop - start, start - 1),),
        commit=Commit(start, spans_of(range(start, stop))),
        token_ids=ids[start:stop].numpy().astype(np.int32),
    )


def text(tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return path, whole_model(path)


def whole_logits(model: tuple[Path, Any], ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model[1](input_ids=ids[None], use_cache=False).logits[0]
    return logits


def run(model: tuple[Path, Any], body: Callable[[Ring], Awaitable[None]]) -> None:
    """Runs ``body`` on a fresh ring; afterwards no stage may hold a cell."""

    async def whole() -> None:
        ring = Ring(model[0])
        try:
            await body(ring)
            for stage in ring.stages:
                stage.close(A)
                stage.close(B)
                assert stage.kv_free_tokens == KV_TOKENS
        finally:
            for stage in ring.stages:
                await stage.aclose()

    asyncio.run(whole())


@pytest.mark.parametrize("chunks", [(60,), (7, 20, 33), (1, 59)], ids=["whole", "chunked", "after-one"])
def test_a_prompt_and_twenty_decoded_tokens_equal_the_whole_model(model: tuple[Path, Any], chunks: tuple[int, ...]) -> None:
    ids = text(80, seed=1)
    reference = whole_logits(model, ids)

    async def body(ring: Ring) -> None:
        ring.open(A)
        start = 0
        for count in (*chunks, *[1] * 20):
            await ring.step(path_work(A, ids, start, start + count))
            start += count
        assert ring.error(A, range(80), reference) < TOLERANCE

    run(model, body)


def test_a_prompt_of_several_blocks_equals_the_whole_model(model: tuple[Path, Any]) -> None:
    ids = text(BLOCK_ROWS + 200, seed=2)
    reference = whole_logits(model, ids)

    async def body(ring: Ring) -> None:
        ring.open(A, lease=len(ids))
        await ring.step(path_work(A, ids, 0, 10))
        await ring.step(path_work(A, ids, 10, len(ids) - 40))
        await ring.step(path_work(A, ids, len(ids) - 40, len(ids)))
        assert ring.error(A, range(len(ids)), reference) < TOLERANCE

    run(model, body)


def test_packed_sessions_of_different_lengths_do_not_touch_each_other(model: tuple[Path, Any]) -> None:
    ids_a, ids_b = text(60, seed=3), text(45, seed=4)
    reference_a, reference_b = whole_logits(model, ids_a), whole_logits(model, ids_b)

    async def body(ring: Ring) -> None:
        ring.open(A)
        ring.open(B)
        await ring.step(path_work(A, ids_a, 0, 40))
        await ring.step(path_work(B, ids_b, 0, 31), path_work(A, ids_a, 40, 41))
        for step in range(14):
            await ring.step(path_work(A, ids_a, 41 + step, 42 + step), path_work(B, ids_b, 31 + step, 32 + step))
        await ring.step(path_work(A, ids_a, 55, 60))
        assert ring.error(A, range(60), reference_a) < TOLERANCE
        assert ring.error(B, range(45), reference_b) < TOLERANCE

    run(model, body)


def test_every_branch_of_a_tree_equals_that_branch_alone_before_and_after_commits(model: tuple[Path, Any]) -> None:
    prompt, left, right, more = text(40, seed=5), text(4, seed=6), text(3, seed=7), text(6, seed=8)

    async def body(ring: Ring) -> None:
        ring.open(A)
        await ring.step(path_work(A, prompt, 0, 40))
        # Two branches under the prompt, one more under the middle of the left one: slots 40-43, 44-46, 47-48.
        runs = (SlotRun(40, 4, 39), SlotRun(44, 3, 39), SlotRun(47, 2, 41))
        ids = torch.cat([left, right, more[:2]]).numpy().astype(np.int32)
        await ring.step(StageWork(session=A, runs=runs, token_ids=ids))
        for slots, branch in (
            (range(40, 44), left),
            (range(44, 47), right),
            ((40, 41, 47, 48), torch.cat([left[:2], more[:2]])),
        ):
            assert ring.error(A, slots, whole_logits(model, torch.cat([prompt, branch]))[40:]) < TOLERANCE
        # A pending path grows before it is answered; then its middle is committed, and the rest rolled back.
        await ring.step(StageWork(session=A, runs=(SlotRun(49, 2, 48),), token_ids=more[2:4].numpy().astype(np.int32)))
        grown = torch.cat([prompt, left[:2], more[:4]])
        assert ring.error(A, (40, 41, 47, 48, 49, 50), whole_logits(model, grown)[40:]) < TOLERANCE
        await ring.step(
            StageWork(
                session=A,
                runs=(SlotRun(51, 3, 47),),
                commit=Commit(40, spans_of([40, 41, 47])),
                token_ids=right.numpy().astype(np.int32),
            )
        )
        regrown = torch.cat([prompt, left[:2], more[:1], right])
        assert ring.error(A, (40, 41, 47, 51, 52, 53), whole_logits(model, regrown)[40:]) < TOLERANCE
        # And plain decoding goes on where the cells are no longer in order.
        tail = text(25, seed=9)
        whole = torch.cat([regrown, tail])
        slot, parent = 54, 53
        for index in range(25):
            work = StageWork(
                session=A,
                runs=(SlotRun(slot, 1, parent),),
                commit=Commit(43, spans_of(range(51, slot))),
                token_ids=tail[index : index + 1].numpy().astype(np.int32),
            )
            await ring.step(work)
            slot, parent = slot + 1, slot
        assert ring.error(A, range(54, 79), whole_logits(model, whole)[46:]) < TOLERANCE

    run(model, body)


def test_more_branches_than_go_in_one_pass_equal_each_branch_alone(model: tuple[Path, Any]) -> None:
    count = BLOCK_ROWS + 40
    stem, leaves = text(20, seed=13), text(count, seed=14)
    deep = text(count, seed=15)

    async def body(ring: Ring) -> None:
        ring.open(A, lease=KV_TOKENS)
        await ring.step(path_work(A, stem, 0, 20))
        star = tuple(SlotRun(20 + index, 1, 19) for index in range(count))
        await ring.step(StageWork(session=A, runs=star, token_ids=leaves.numpy().astype(np.int32)))
        for index in (0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, count - 1):
            whole = torch.cat([stem, leaves[index : index + 1]])
            assert ring.error(A, (20 + index,), whole_logits(model, whole)[20:]) < TOLERANCE

    run(model, body)

    async def fork(ring: Ring) -> None:
        ring.open(A, lease=KV_TOKENS)
        await ring.step(path_work(A, stem, 0, 20))
        # Two paths, the second of which begins in the first pass and ends in the second.
        runs = (SlotRun(20, 10, 19), SlotRun(30, count - 10, 19))
        await ring.step(StageWork(session=A, runs=runs, token_ids=deep.numpy().astype(np.int32)))
        reference = whole_logits(model, torch.cat([stem, deep[10:]]))
        assert ring.error(A, range(30, 20 + count), reference[20:]) < TOLERANCE

    run(model, fork)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "granite", "qwen3"])
def test_softcaps_sinks_and_scaled_embeddings_and_logits_survive_the_split(family: str, tmp_path: Path) -> None:
    special = {
        "gpt_oss": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_window": 16,
            "num_local_experts": 4,
        },
        "gemma2": {"sliding_window": 16},
        "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.2},
    }
    path = tiny_model(family, tmp_path, **special.get(family, {}))
    model = path, whole_model(path)
    ids = text(50, seed=12)
    reference = whole_logits(model, ids)

    async def body(ring: Ring) -> None:
        ring.open(A)
        for start, stop in ((0, 36), (36, 45), *((at, at + 1) for at in range(45, 50))):
            await ring.step(path_work(A, ids, start, stop))
        assert ring.error(A, range(50), reference) < TOLERANCE

    run(model, body)


def test_a_commit_alone_computes_nothing_and_frees_the_dead(model: tuple[Path, Any]) -> None:
    ids = text(30, seed=10)

    async def body(ring: Ring) -> None:
        ring.open(A, lease=32)
        await ring.step(
            StageWork(session=A, runs=(SlotRun(0, 10, NO_SLOT), SlotRun(10, 20, 4)), token_ids=ids.numpy().astype(np.int32))
        )
        await ring.step(StageWork(session=A, runs=(), commit=Commit(0, spans_of(range(5)))))
        await ring.step(StageWork(session=A, runs=(), commit=Commit(5, spans_of(range(10, 12)))))
        path = torch.cat([ids[:5], ids[10:12]])
        extra = text(7, seed=11)
        await ring.step(StageWork(session=A, runs=(SlotRun(30, 7, 29),), token_ids=extra.numpy().astype(np.int32)))
        reference = whole_logits(model, torch.cat([path, ids[12:30], extra]))
        assert ring.error(A, range(30, 37), reference[25:]) < TOLERANCE

    run(model, body)

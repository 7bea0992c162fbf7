"""Sessions that share calls of attention get what each gets alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from models import HIDDEN, VOCABULARY, tiny_model, whole_model

from farflung.core.errors import StageFailed
from farflung.core.ids import SessionId
from farflung.core.model import LayerRange
from farflung.core.sampling import SamplingOptions
from farflung.core.window import NO_SLOT, Commit, SlotRun, spans_of
from farflung.engine.backend import SessionSpec, StageWork
from farflung.engine.kv_pool import NewRows, SessionCells
from farflung.engine.loader import load_stage
from farflung.engine.safetensors_source import SafetensorsSource
from farflung.engine.segments import PAD_KEYS, Segment, even_runs, groups_of
from farflung.engine.torch_backend import BackendConfig, TorchBackend, load_backend


@pytest.mark.parametrize(
    ("starts", "runs"),
    [
        ([], []),
        ([5], [[0]]),
        ([5, 90], [[0, 1]]),
        ([0, 10, 20, 30], [[0, 1, 2, 3]]),
        ([0, 10, 20, 35, 50, 51], [[0, 1, 2], [3, 4], [5]]),
        ([0, 1, 3, 7], [[0, 1], [2, 3]]),
    ],
    ids=["none", "one", "any two", "all", "three, then two, then one", "pairs"],
)
def test_starts_at_equal_distances_make_runs(starts: list[int], runs: list[list[int]]) -> None:
    assert list(even_runs(starts)) == runs


class Packed(NamedTuple):
    """Rows of one session that go into a pass."""

    base: int
    rows: NewRows
    cells: SessionCells

    def segment(self, start: int) -> Segment:
        return Segment(start, self.base, self.rows, self.cells, torch.float32)


def packed(lengths: list[tuple[int, int]], new: int) -> list[Packed]:
    """Sessions of (tokens held, spare cells), side by side in the pool, each with ``new`` more rows on a path."""
    made, base = [], 0
    for held, spare in lengths:
        session = SessionCells(held + new + spare)
        session.apply((SlotRun(0, held, NO_SLOT),), Commit(0, spans_of(range(held))))
        made.append(Packed(base, session.apply((SlotRun(held, new, held - 1),), None), session))
        base += session.size
    return made


def segments_of(sessions: list[Packed]) -> list[Segment]:
    return [session.segment(index * len(session.rows.slots)) for index, session in enumerate(sessions)]


def test_sessions_of_one_lease_and_about_one_length_share_a_call_and_others_do_not() -> None:
    even = segments_of(packed([(50, 70), (60, 60), (70, 50), (80, 40)], 1))
    (group,) = groups_of(even, None, torch.float32)
    assert (group.starts, group.stride, group.length) == ([0, 1, 2, 3], 121, 81)
    far = segments_of(packed([(50, 300), (50 + PAD_KEYS + 1, 300)], 1))
    assert len(list(groups_of(far, None, torch.float32))) == 2
    full = segments_of(packed([(50, 0), (60, 0)], 1))  # padding the first would reach into the second's lease
    assert len(list(groups_of(full, None, torch.float32))) == 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_eight_packed_sessions_say_what_each_says_alone(family: str, tmp_path: Path) -> None:
    changes = {
        "gpt_oss": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_window": 16,
            "num_local_experts": 4,
        },
        "gemma2": {"sliding_window": 16},
    }
    path = tiny_model(family, tmp_path, layers=2, **changes.get(family, {}))
    source = SafetensorsSource.of_folder(path)
    whole = whole_model(path)
    sessions = [SessionId(f"{number:032x}") for number in range(8)]
    ids = {
        session: torch.randint(3, VOCABULARY, (12 + 5 * number,), generator=torch.Generator().manual_seed(number))
        for number, session in enumerate(sessions)
    }
    logits: dict[SessionId, list[torch.Tensor]] = {session: [] for session in sessions}
    config = BackendConfig(kv_tokens=800, on_logits=lambda session, slots, rows: logits[session].extend(rows.clone()))
    backend = load_backend(source, source.spec().all_layers, torch.float32, config)

    def work(session: SessionId, start: int, tokens: list[int]) -> StageWork:
        slots = range(start, start + len(tokens))
        return StageWork(
            session=session,
            runs=(SlotRun(start, len(tokens), start - 1),),
            commit=Commit(start, spans_of(slots)),
            token_ids=np.array(tokens, np.int32),
            want=(slots[-1],),
        )

    async def body() -> dict[SessionId, list[int]]:
        texts = {session: ids[session].tolist() for session in sessions}
        for session in sessions:
            backend.open(SessionSpec(session=session, lease_tokens=80, sampling=SamplingOptions(temperature=0.0), codec="fp32"))
        batch = [work(session, 0, texts[session]) for session in sessions]
        for _ in range(20):
            report = await backend.step(batch)
            batch = []
            for session, result in zip(sessions, report.results, strict=True):
                assert result.error is None
                batch.append(work(session, len(texts[session]), [*result.tokens]))
                texts[session] += result.tokens
        await backend.aclose()
        return texts

    for session, said in asyncio.run(body()).items():
        start = len(ids[session])
        with torch.inference_mode():
            expected = whole(input_ids=torch.tensor(said)[None], use_cache=False).logits[0, start - 1 : -1]
        found = torch.stack(logits[session])
        assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-5
        assert expected.argmax(-1).tolist() == said[start:]


def test_what_a_failed_session_left_in_the_pool_spoils_nobody(tmp_path: Path) -> None:
    source = SafetensorsSource.of_folder(tiny_model("llama", tmp_path, layers=2))
    stage = load_stage(source, LayerRange(1, 2), torch.float32)
    backend = TorchBackend(stage, source.spec(), BackendConfig(kv_tokens=64))
    hook = stage.layers[0].register_forward_pre_hook(lambda _, hidden: (hidden[0] * torch.nan, *hidden[1:]))
    bad, good, other = (SessionId(f"{number:032x}") for number in range(3))

    def work(session: SessionId, start: int, rows: np.ndarray) -> StageWork:
        runs = (SlotRun(start, len(rows), start - 1),)
        return StageWork(session=session, runs=runs, rows=rows.astype("<f4").tobytes())

    async def body() -> None:
        def open_(session: SessionId) -> None:
            backend.open(SessionSpec(session=session, lease_tokens=32, sampling=SamplingOptions(), codec="fp32"))

        open_(bad)
        (failed,) = (await backend.step([work(bad, 0, np.ones((30, HIDDEN)))])).results
        assert isinstance(failed.error, StageFailed)
        hook.remove()
        backend.close(bad)
        open_(good)  # in the very cells of the failed one
        open_(other)
        rows = np.random.default_rng(1).normal(size=(12, HIDDEN))
        await backend.step([work(good, 0, rows[:4]), work(other, 0, rows)])
        report = await backend.step([work(good, 4, rows[:1]), work(other, 12, rows[:1])])
        assert [result.error for result in report.results] == [None, None]
        await backend.aclose()

    asyncio.run(body())

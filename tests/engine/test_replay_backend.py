"""The backend without a model: it counts and refuses as a real one does; its tokens tell whether every stage held the path."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.core.errors import SessionRefused, UsageError
from farflung.core.ids import SessionId
from farflung.core.model import LayerRange
from farflung.core.sampling import SamplingOptions
from farflung.core.window import NO_SLOT, Commit, SlotRun, SlotSpan
from farflung.engine.backend import SessionSpec, StageResult, StageWork
from farflung.engine.replay_backend import ReplayBackend, ReplayConfig, ReplayModel
from farflung.engine.replay_tokens import PathTokens, TokenSource, read_traces
from farflung.lab.virtual_clock import run_virtual
from farflung.wire.codec import codec

SPEC = ReplayModel(name="m", layers=4, hidden_size=256, vocab_size=1000).spec()
CURVE = ((1, 13.2), (501, 113.2))
S = SessionId("a" * 32)


def stages(tokens: PathTokens, *, virtual: bool = True) -> list[ReplayBackend]:
    config = ReplayConfig(curve_ms=CURVE, kv_tokens=512, virtual=virtual)
    return [ReplayBackend(SPEC, LayerRange(a, b), tokens, config) for a, b in ((0, 1), (1, 3), (3, 4))]


def open_all(made: list[ReplayBackend], lease: int = 128) -> None:
    for backend in made:
        backend.open(SessionSpec(session=S, lease_tokens=lease, sampling=SamplingOptions(), codec="int8"))


async def through(
    made: list[ReplayBackend], runs: tuple[SlotRun, ...], ids: list[int], want: tuple[int, ...], commit: Commit | None = None
) -> StageResult:
    rows: bytes | None = None
    result = StageResult(session=S)
    for backend in made:
        first = backend.layers.start == 0
        work = StageWork(
            session=S, runs=runs, commit=commit, token_ids=np.array(ids, np.int32) if first else None, rows=rows, want=want
        )
        result = (await backend.step([work])).results[0]
        if result.error is not None:
            raise result.error
        rows = result.rows
    return result


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 999), min_size=2, max_size=30), st.data())
def test_the_next_token_depends_on_the_path_and_not_on_the_windows_that_brought_it(ids: list[int], data: st.DataObject) -> None:
    tokens = PathTokens(TokenSource(vocab_size=1000, seed=7))
    cut = data.draw(st.integers(1, len(ids) - 1))

    async def run() -> tuple[int, ...]:
        made = stages(tokens)
        open_all(made)
        await through(made, (SlotRun(0, cut, NO_SLOT),), ids[:cut], (), Commit(0, (SlotSpan(0, cut),)))
        # A tree: the path goes on in one branch, another token hangs beside it.
        rest = len(ids) - cut
        runs = (SlotRun(cut, rest, cut - 1), SlotRun(cut + rest, 1, cut - 1))
        return (await through(made, runs, [*ids[cut:], 5], (len(ids) - 1,))).tokens

    assert run_virtual(run()) == tuple(tokens.continuation(ids, 1))


def test_a_stage_that_holds_another_path_spoils_the_tokens() -> None:
    tokens = PathTokens(TokenSource(vocab_size=2**30))

    async def run() -> tuple[int, ...]:
        made = stages(tokens)
        open_all(made)
        whole = Commit(0, (SlotSpan(0, 3),))
        await through(made[:1], (SlotRun(0, 3, NO_SLOT),), [1, 2, 3], (), whole)
        other = stages(tokens)
        open_all(other)
        await through(other, (SlotRun(0, 3, NO_SLOT),), [1, 2, 4], (), whole)
        mixed = [made[0], other[1], other[2]]
        return (await through(mixed, (SlotRun(3, 1, 2),), [9], (3,))).tokens

    assert run_virtual(run()) != tuple(tokens.continuation([1, 2, 3, 9], 1))


def test_a_recorded_path_has_the_recorded_tokens(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"name": "x", "prompt_ids": [1, 2], "out_ids": [3, 4, 5], "other": [{}]}))
    traces = read_traces(tmp_path)
    tokens = PathTokens(TokenSource(vocab_size=10, traces=traces))
    assert tokens.continuation([1, 2], 3) == [3, 4, 5]
    assert tokens.continuation([1, 2, 3], 2) == [4, 5]
    with pytest.raises(UsageError, match="vocabulary 5"):
        PathTokens(TokenSource(vocab_size=5, traces=traces))
    with pytest.raises(UsageError, match="no traces"):
        read_traces(tmp_path / "none")


def test_rows_have_the_size_that_the_codec_gives_the_width() -> None:
    async def run(name: str, rows: int) -> bytes | None:
        backend = stages(PathTokens(TokenSource(vocab_size=1000)))[0]
        backend.open(SessionSpec(session=S, lease_tokens=64, sampling=SamplingOptions(), codec="fp32", codec_out=name))
        work = StageWork(session=S, runs=(SlotRun(0, rows, NO_SLOT),), token_ids=np.arange(rows, dtype=np.int32))
        return (await backend.step([work])).results[0].rows

    for name in ("fp32", "bf16", "int8", "int4"):
        for rows in (1, 5):
            assert len(run_virtual(run(name, rows)) or b"") == rows * codec(name).row_bytes(256)


def test_leases_are_counted_and_a_session_closed_in_a_step_keeps_its_own_until_the_end() -> None:
    async def run() -> None:
        backend = stages(PathTokens(TokenSource(vocab_size=1000)))[0]
        backend.open(SessionSpec(session=S, lease_tokens=500, sampling=SamplingOptions(), codec="int8"))
        assert backend.kv_free_tokens == 12
        with pytest.raises(SessionRefused, match="12"):
            backend.open(SessionSpec(session=SessionId("b" * 32), lease_tokens=13, sampling=SamplingOptions(), codec="int8"))
        work = StageWork(session=S, runs=(SlotRun(0, 1, NO_SLOT),), token_ids=np.array([1], np.int32))
        stepping = asyncio.create_task(backend.step([work]))
        await asyncio.sleep(0.001)
        backend.close(S)
        assert backend.kv_free_tokens == 12
        await stepping
        assert backend.kv_free_tokens == 512

    run_virtual(run())


def test_a_step_takes_its_time_on_the_virtual_clock_and_in_a_real_thread() -> None:
    work = StageWork(session=S, runs=(SlotRun(0, 101, NO_SLOT),), token_ids=np.arange(101, dtype=np.int32))

    async def run(virtual: bool) -> tuple[float, float]:
        backend = stages(PathTokens(TokenSource(vocab_size=1000)), virtual=virtual)[0]
        open_all([backend])
        began = asyncio.get_running_loop().time()
        report = await backend.step([work])
        passed = asyncio.get_running_loop().time() - began
        await backend.aclose()
        return report.compute_s, passed

    assert run_virtual(run(True)) == (pytest.approx(0.0332), pytest.approx(0.0332))
    began = time.perf_counter()
    compute_s, passed_s = asyncio.run(run(False))
    assert 0.0332 <= compute_s <= passed_s <= time.perf_counter() - began


def test_it_is_imported_without_torch() -> None:
    code = "import sys, farflung.engine.replay_backend as _; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0

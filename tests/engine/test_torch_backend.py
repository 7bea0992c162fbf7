"""The backend's promises beside exactness: refusals, isolation of sessions, threads, leases, sampling."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_model

from farflung.core.errors import CodecError, MalformedFrame, ProtocolViolation, SessionRefused, StageFailed
from farflung.core.ids import SessionId
from farflung.core.model import LayerRange
from farflung.core.sampling import SamplingOptions
from farflung.core.window import Commit, SlotRun, spans_of
from farflung.engine.attention import ATTENTION
from farflung.engine.backend import SessionSpec, StageResult, StageWork
from farflung.engine.bench import StageBenchConfig, bench_stage
from farflung.engine.blocked_linear import BlockedLinear, block_linears
from farflung.engine.compute import ComputeThread
from farflung.engine.loader import load_stage
from farflung.engine.safetensors_source import SafetensorsSource
from farflung.engine.segments import BLOCK_ROWS, MASK_CELLS, max_rows
from farflung.engine.t_curve import measure_t_curve
from farflung.engine.tail import HEAD_ROWS
from farflung.engine.torch_backend import BackendConfig, TorchBackend, load_backend
from farflung.sampling.sampler import sample_rows

A, B = SessionId("a" * 32), SessionId("b" * 32)
WHOLE = LayerRange(0, 6)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsSource:
    return SafetensorsSource.of_folder(tiny_model("qwen2", tmp_path_factory.mktemp("qwen2")))


def backend_of(source: SafetensorsSource, layers: LayerRange = WHOLE, **changes: object) -> TorchBackend:
    return load_backend(source, layers, torch.float32, BackendConfig(**{"kv_tokens": 100, **changes}))  # type: ignore[arg-type]


def spec_of(session: SessionId, lease: int = 40, **sampling: float) -> SessionSpec:
    return SessionSpec(session=session, lease_tokens=lease, sampling=SamplingOptions(**sampling), codec="fp32")


def prompt(session: SessionId, ids: list[int]) -> StageWork:
    count = len(ids)
    return StageWork(
        session=session,
        runs=(SlotRun(0, count, -1),),
        commit=Commit(0, spans_of(range(count))),
        token_ids=np.array(ids, np.int32),
        want=(count - 1,),
    )


def results_of(
    backend: TorchBackend, *work: StageWork, sessions: tuple[SessionSpec, ...] = (spec_of(A), spec_of(B))
) -> list[StageResult]:
    async def body() -> list[StageResult]:
        try:
            for spec in sessions:
                backend.open(spec)
            return list((await backend.step(work)).results)
        finally:
            await backend.aclose()

    return asyncio.run(body())


def test_a_lease_that_does_not_fit_is_refused_and_closing_makes_room(source: SafetensorsSource) -> None:
    backend = backend_of(source, inline=True)
    backend.open(spec_of(A, lease=70))
    with pytest.raises(SessionRefused, match="40 tokens does not fit: 30 of 100 are free"):
        backend.open(spec_of(B, lease=40))
    with pytest.raises(SessionRefused, match="open already"):
        backend.open(spec_of(A, lease=10))
    with pytest.raises(SessionRefused, match="holds nothing"):
        backend.open(spec_of(B, lease=0))
    with pytest.raises(CodecError, match="no codec 'zip'"):
        backend.open(SessionSpec(session=B, lease_tokens=1, sampling=SamplingOptions(), codec="zip"))
    backend.close(A)
    backend.close(A)
    backend.open(spec_of(B, lease=100))
    assert backend.kv_free_tokens == 0


def test_what_is_announced_as_free_is_the_largest_lease_that_is_granted(source: SafetensorsSource) -> None:
    backend = backend_of(source, inline=True)
    backend.open(spec_of(A, lease=30))
    backend.open(spec_of(B, lease=30))
    backend.close(A)
    assert backend.kv_free_tokens == 40  # of 70 that nobody holds
    with pytest.raises(SessionRefused, match="70 of 100 are free, 40 of them in one piece"):
        backend.open(spec_of(A, lease=41))
    backend.open(spec_of(A, lease=40))


def one(slot: int, parent: int, *ids: int) -> StageWork:
    return StageWork(session=A, runs=(SlotRun(slot, 1, parent),), token_ids=np.array(ids, np.int32))


@pytest.mark.parametrize(
    ("work", "error", "says"),
    [
        (one(0, -1, 4, 5), MalformedFrame, "1 slots came with 2 token ids"),
        (prompt(A, [4] * 41), SessionRefused, "exceed the KV lease of 40"),
        (one(3, 2, 4), ProtocolViolation, "never announced"),
        (prompt(SessionId("c" * 32), [4]), ProtocolViolation, "not open here"),
    ],
    ids=["row-count", "lease", "parent", "unknown-session"],
)
def test_a_bad_window_fails_its_own_session_and_no_other(
    source: SafetensorsSource, work: StageWork, error: type[Exception], says: str
) -> None:
    bad, good = results_of(backend_of(source), work, prompt(B, [5, 6, 7]))
    assert isinstance(bad.error, error)
    assert says in str(bad.error)
    (alone,) = results_of(backend_of(source), prompt(B, [5, 6, 7]))
    assert good.error is None
    assert good.tokens == alone.tokens


@pytest.mark.parametrize(
    ("rows", "says"),
    [(b"123", "no whole number"), (bytes(512), "2 slots came with 1 rows"), (np.full(256, np.nan, np.float32).tobytes(), "")],
    ids=["size", "row-count", "nan"],
)
def test_rows_that_do_not_decode_fail_their_own_session(source: SafetensorsSource, rows: bytes, says: str) -> None:
    good_rows = np.ones((1, 128), np.float32).tobytes()
    bad, good = results_of(
        backend_of(source, LayerRange(2, 4)),
        StageWork(session=A, runs=(SlotRun(0, 2, -1),), rows=rows),
        StageWork(session=B, runs=(SlotRun(0, 1, -1),), rows=memoryview(good_rows)),
    )
    assert isinstance(bad.error, (CodecError, MalformedFrame))
    assert says in str(bad.error)
    assert good.error is None
    assert good.rows is not None
    assert len(good.rows) == 512


@pytest.mark.parametrize("layers", [LayerRange(0, 3), WHOLE], ids=["first-stage", "tail"])
def test_activations_that_are_not_finite_fail_their_own_session(source: SafetensorsSource, layers: LayerRange) -> None:
    stage = load_stage(source, layers, torch.float32)
    assert stage.embed is not None
    backend = TorchBackend(stage, source.spec(), BackendConfig(kv_tokens=100))
    stage.embed.weight.data[9] = torch.inf
    bad, good = results_of(backend, prompt(A, [4, 9, 5]), prompt(B, [4, 5]))
    assert isinstance(bad.error, StageFailed)
    assert "not finite" in str(bad.error)
    assert good.error is None


def test_the_tail_samples_with_the_position_of_the_token_to_come(source: SafetensorsSource) -> None:
    seen: dict[SessionId, np.ndarray] = {}
    backend = backend_of(source, on_logits=lambda session, slots, logits: seen.update({session: logits.numpy().copy()}))
    options = {"temperature": 5.0, "seed": 7}
    (result,) = results_of(backend, prompt(A, [4, 5, 6]), sessions=(spec_of(A, **options),))
    assert result.tokens == tuple(sample_rows(seen[A], SamplingOptions(**options), [3]))


def test_answers_to_every_row_of_a_long_window_come_in_order_from_few_logits_at_a_time(source: SafetensorsSource) -> None:
    count = 2 * HEAD_ROWS + 5
    sizes: list[int] = []
    ids = [3 + index % 300 for index in range(count)]
    every = dataclasses.replace(prompt(A, ids), want=tuple(range(count)))
    backend = backend_of(source, kv_tokens=200, on_logits=lambda session, slots, logits: sizes.append(len(logits)))
    (result,) = results_of(backend, every, sessions=(spec_of(A, lease=count),))
    assert sizes == [HEAD_ROWS, HEAD_ROWS, 5]
    backwards = dataclasses.replace(every, want=every.want[::-1])
    (reverse,) = results_of(backend_of(source, kv_tokens=200), backwards, sessions=(spec_of(A, lease=count),))
    assert len(result.tokens) == count
    assert reverse.tokens == result.tokens[::-1]


@pytest.mark.parametrize("keys", [1, 4096, MASK_CELLS // BLOCK_ROWS, 131072, 10 * MASK_CELLS])
def test_the_mask_of_a_pass_is_bounded(keys: int) -> None:
    assert 1 <= max_rows(keys) <= BLOCK_ROWS
    assert max_rows(keys) == 1 or max_rows(keys) * keys <= MASK_CELLS


def without_memory(*_: object) -> None:
    torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize("where", ["layers", "head"])
def test_memory_that_cannot_be_had_ends_the_sessions_of_the_step_and_not_the_node(
    source: SafetensorsSource, where: str
) -> None:
    stage = load_stage(source, WHOLE, torch.float32)
    assert stage.norm is not None
    backend = TorchBackend(stage, source.spec(), BackendConfig(kv_tokens=100))
    hook = (stage.layers[3] if where == "layers" else stage.norm).register_forward_pre_hook(without_memory)

    async def body() -> None:
        for spec in (spec_of(A), spec_of(B)):
            backend.open(spec)
        bad = (await backend.step([prompt(A, [4, 5]), prompt(B, [6])])).results
        assert [type(result.error) for result in bad] == [StageFailed, StageFailed]
        assert all("memory" in str(result.error) for result in bad)
        hook.remove()
        for session in (A, B):
            backend.close(session)
        backend.open(spec_of(A))
        (good,) = (await backend.step([prompt(A, [4, 5])])).results
        assert good.error is None
        await backend.aclose()

    asyncio.run(body())


def test_inline_and_threaded_compute_give_the_same_tokens(source: SafetensorsSource) -> None:
    (inline,) = results_of(backend_of(source, inline=True), prompt(A, [4, 5, 6]))
    (threaded,) = results_of(backend_of(source), prompt(A, [4, 5, 6]))
    assert inline.tokens == threaded.tokens


def test_cells_of_a_session_closed_in_its_running_step_are_free_only_after_it(source: SafetensorsSource) -> None:
    may_end = threading.Event()

    async def body() -> None:
        loop, started = asyncio.get_running_loop(), asyncio.Event()

        def hold(*_: object) -> None:
            loop.call_soon_threadsafe(started.set)
            may_end.wait(10)

        backend = backend_of(source, on_logits=hold)
        backend.open(spec_of(A))
        running = asyncio.ensure_future(backend.step([prompt(A, [4, 5, 6])]))
        await started.wait()
        with pytest.raises(ProtocolViolation, match="while another runs"):
            await backend.step([prompt(A, [4])])
        backend.close(A)
        assert backend.kv_free_tokens == 60
        running.cancel()
        await asyncio.sleep(0)
        assert not running.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert backend.kv_free_tokens == 100
        await backend.aclose()

    asyncio.run(body())


def test_what_is_raised_in_the_compute_thread_reaches_the_caller_and_the_thread_ends_when_closed() -> None:
    def fail() -> None:
        raise KeyError(threading.current_thread().name)

    async def body() -> None:
        compute = ComputeThread("farflung-test")
        with pytest.raises(KeyError, match="farflung-test"):
            await compute.run(fail)
        assert await compute.run(lambda: 5) == 5
        await compute.aclose()
        await compute.aclose()
        with pytest.raises(ProtocolViolation, match="closed"):
            await compute.run(lambda: 5)

    asyncio.run(body())
    assert "farflung-test" not in {thread.name for thread in threading.enumerate()}


def test_several_may_close_the_compute_thread_at_a_time_and_one_of_them_give_up() -> None:
    may_end = threading.Event()

    async def body() -> None:
        compute = ComputeThread("farflung-test")
        running = asyncio.ensure_future(compute.run(lambda: may_end.wait(10)))
        await asyncio.sleep(0)
        closing = [asyncio.ensure_future(compute.aclose()) for _ in range(3)]
        await asyncio.sleep(0)
        closing[0].cancel()
        await asyncio.wait(closing[:1])
        may_end.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*closing[1:], running)
        await compute.aclose()

    asyncio.run(body())
    assert "farflung-test" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(("outputs", "inputs", "bias"), [(320, 256, True), (1026, 64, False), (4096, 32, True)])
def test_fp32_weights_in_blocks_give_the_plain_product_and_are_no_copy(outputs: int, inputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, bias=bias)
    blocked = BlockedLinear(linear, 4)
    assert blocked.weight is linear.weight
    with torch.inference_mode():
        for shape in ((1, 1), (1, 3), (2, 2), (1, 5), (1, 0)):
            rows = torch.randn((*shape, inputs))
            torch.testing.assert_close(blocked(rows), linear(rows), rtol=1e-5, atol=1e-5)


def test_only_large_plain_fp32_weights_are_ever_multiplied_in_blocks() -> None:
    small, odd, narrow = torch.nn.Linear(64, 64), torch.nn.Linear(512, 513), torch.nn.Linear(512, 512, dtype=torch.bfloat16)
    large = torch.nn.Linear(512, 512)
    model = torch.nn.ModuleDict({"small": small, "odd": odd, "narrow": narrow, "large": large})
    assert block_linears(model) in (0, 1)  # as measured here
    assert (model["small"], model["odd"], model["narrow"]) == (small, odd, narrow)
    assert model["large"].weight is large.weight


def test_the_t_curve_leaves_out_what_does_not_fit_and_every_cell_is_free_after_it(source: SafetensorsSource) -> None:
    async def body(layers: LayerRange, budget_s: float) -> dict[int, float]:
        backend = backend_of(source, layers)
        try:
            curve = await measure_t_curve(backend, budget_s=budget_s)
            assert backend.kv_free_tokens == 100
            return curve
        finally:
            await backend.aclose()

    for layers in (LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6)):
        curve = asyncio.run(body(layers, 30.0))
        assert list(curve) == [1, 4, 16, 64]  # 256 tokens are more than the KV
        assert all(ms > 0 for ms in curve.values())
    assert list(asyncio.run(body(WHOLE, 0.0))) == [1, 16]


def test_a_family_that_sdpa_does_not_serve_loads_and_is_measured_beside_transformers_own_choice(tmp_path: Path) -> None:
    source = SafetensorsSource.of_folder(tiny_model("gemma2", tmp_path))
    assert load_stage(source, LayerRange(2, 4), torch.float32).layers[0].self_attn.config._attn_implementation == ATTENTION
    config = StageBenchConfig(dtype=torch.float32, prompt_tokens=4, new_tokens=2, repeats=1, curve_budget_s=0.1)
    assert bench_stage(source, config)["ratio"] > 0


@pytest.mark.parametrize("layers", [None, LayerRange(2, 4), LayerRange(4, 6)], ids=str)
def test_the_stage_benchmark_reports_both_sides(source: SafetensorsSource, layers: LayerRange | None) -> None:
    figures = bench_stage(
        source,
        StageBenchConfig(layers=layers, dtype=torch.float32, prompt_tokens=8, new_tokens=4, repeats=1, curve_budget_s=0.1),
    )
    assert set(figures) == {"t_curve_ms", "decode_tokens_per_s", "reference_tokens_per_s", "ratio", "prefill_tokens_per_s"}
    assert figures["decode_tokens_per_s"] > 0
    assert figures["reference_tokens_per_s"] > 0

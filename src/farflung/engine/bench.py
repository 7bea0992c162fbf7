"""How fast a stage decodes here, beside plain transformers: same weights, prompt, threads and run.

Ours is a node's own path: the event loop awaits one step per token, codec and sampling included. Theirs is ``generate`` where
the stage is the whole model, else the same layers with transformers' cache. Both take turns, so that what else the machine
does falls on both; medians are compared.
"""

from __future__ import annotations

import asyncio
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from farflung.core.errors import UsageError
from farflung.core.ids import SessionId
from farflung.core.model import LayerRange
from farflung.core.sampling import SamplingOptions
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.engine.backend import SessionSpec, StageWork
from farflung.engine.kernel_plan import Quantised
from farflung.engine.loader import StageModule, load_stage
from farflung.engine.source import ModelSource, Progress
from farflung.engine.t_curve import measure_t_curve
from farflung.engine.torch_backend import BackendConfig, TorchBackend, load_backend
from farflung.wire.codec import codec

_SESSION = SessionId("1" * 32)
_CODECS = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # those that keep every bit of the dtype


@dataclass(frozen=True, kw_only=True)
class StageBenchConfig:
    """What is measured.

    Attributes:
        layers: the stage; None is the whole model.
        dtype: of the weights, on both sides.
        quantised: what ours are rounded to.
        threads: OpenMP workers, on both sides; None leaves torch's choice.
        prompt_tokens: computed before decoding, in one chunk.
        new_tokens: decoded in each repeat.
        repeats: turns of each side.
        curve_budget_s: time for the T-curve.
    """

    layers: LayerRange | None = None
    dtype: torch.dtype = torch.bfloat16
    quantised: Quantised | None = None
    threads: int | None = None
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3
    curve_budget_s: float = 5.0


@dataclass(frozen=True)
class _Run:
    """One prompt and its decoding: seconds until the first token, and between it and the last."""

    prompt_s: float
    decode_s: float


def bench_stage(source: ModelSource, config: StageBenchConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Measures; blocks for a minute or so. Not to be called where an event loop runs.

    Returns ``t_curve_ms`` (milliseconds by tokens), ``decode_tokens_per_s``, ``reference_tokens_per_s``, their ``ratio`` and
    ``prefill_tokens_per_s``. Raises UsageError for counts below what can be measured, and what loading raises.
    """
    if config.new_tokens < 2 or config.prompt_tokens < 1 or config.repeats < 1:
        raise UsageError(
            f"{config.repeats} repeats of {config.new_tokens} tokens after {config.prompt_tokens} measure nothing",
            hint="at least 1 repeat, 2 new tokens and 1 prompt token",
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    layers = config.layers or source.spec(progress=progress).all_layers
    lease = config.prompt_tokens + config.new_tokens
    backend = load_backend(
        source,
        layers,
        config.dtype,
        BackendConfig(kv_tokens=max(lease, 256), threads=config.threads, quantised=config.quantised),
        progress=progress,
    )
    stage = load_stage(source, layers, config.dtype, attention=None, progress=progress)
    reference = GenerateReference(stage) if stage.is_first and stage.is_last else _LayersReference(stage)
    return asyncio.run(_measure(backend, reference.run, config))


async def _measure(backend: TorchBackend, reference: Callable[[int, int], _Run], config: StageBenchConfig) -> dict[str, Any]:
    try:
        curve = await measure_t_curve(backend, budget_s=config.curve_budget_s)
        ours: list[_Run] = []
        theirs: list[_Run] = []
        for turn in range(config.repeats + 1):
            mine = await _run_ours(backend, config)
            other = reference(config.prompt_tokens, config.new_tokens)
            if turn:  # the first warms up
                ours.append(mine)
                theirs.append(other)
    finally:
        await backend.aclose()
    per_token = statistics.median(run.decode_s for run in ours) / (config.new_tokens - 1)
    reference_per_token = statistics.median(run.decode_s for run in theirs) / (config.new_tokens - 1)
    return {
        "t_curve_ms": {tokens: round(ms, 3) for tokens, ms in curve.items()},
        "decode_tokens_per_s": round(1 / per_token, 2),
        "reference_tokens_per_s": round(1 / reference_per_token, 2),
        "ratio": round(reference_per_token / per_token, 3),
        "prefill_tokens_per_s": round(config.prompt_tokens / statistics.median(run.prompt_s for run in ours), 1),
    }


async def _run_ours(backend: TorchBackend, config: StageBenchConfig) -> _Run:
    is_first, is_last = backend.layers.start == 0, backend.layers.stop == backend.spec.layers
    name = _CODECS[config.dtype]
    row = codec(name).encode(np.ones((1, backend.spec.hidden_size), np.float32))
    ids = _prompt(config.prompt_tokens, backend.spec.vocab_size)
    lease = config.prompt_tokens + config.new_tokens
    backend.open(SessionSpec(session=_SESSION, lease_tokens=lease, sampling=SamplingOptions(), codec=name))
    stamps = [time.perf_counter()]
    try:
        start = 0
        for _ in range(config.new_tokens):
            work = StageWork(
                session=_SESSION,
                runs=(SlotRun(start, len(ids), start - 1),),
                commit=Commit(start, (SlotSpan(start, len(ids)),)),
                token_ids=ids if is_first else None,
                rows=None if is_first else row * len(ids),
                want=(start + len(ids) - 1,) if is_last else (),
            )
            result = (await backend.step([work])).results[0]
            if result.error is not None:
                raise result.error
            stamps.append(time.perf_counter())
            start += len(ids)
            ids = np.array(result.tokens or (0,), np.int32)
    finally:
        backend.close(_SESSION)
    return _Run(stamps[1] - stamps[0], stamps[-1] - stamps[1])


def _prompt(tokens: int, vocab_size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return (np.arange(tokens, dtype=np.int64) * 7919 % vocab_size).astype(np.int32)


class GenerateReference:
    """``generate`` of transformers, greedy, with its own cache, as a user would call it."""

    def __init__(self, stage: StageModule) -> None:
        self._model = stage.model
        self._model.generation_config.eos_token_id = None  # a text that ends early would compare unequal work

    def run(self, prompt_tokens: int, new_tokens: int) -> _Run:
        stamps = _Stamps()
        ids = torch.from_numpy(_prompt(prompt_tokens, self._model.config.vocab_size)).long()[None]
        start = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=stamps,
        )
        first, last = stamps.times[1], stamps.times[-1]  # the first call hands over the prompt
        return _Run(first - start, last - first)


class _Stamps:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return


class _LayersReference:
    """transformers' own forward over the stage's layers, with its cache; with embedding, head and argmax where it has them."""

    def __init__(self, stage: StageModule) -> None:
        self._stage = stage
        parameters = inspect.signature(stage.base.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # renamed within transformers 5
        for module in stage.layers.modules():  # the stock cache sizes its masks by its first layer
            if hasattr(module, "layer_idx"):
                module.layer_idx -= stage.layer_range.start

    def run(self, prompt_tokens: int, new_tokens: int) -> _Run:
        from transformers import DynamicCache

        stage = self._stage
        cache = {self._cache_name: DynamicCache(config=stage.base.config)}
        stamps = [time.perf_counter()]
        count = prompt_tokens
        start = 0
        with torch.inference_mode():
            for _ in range(new_tokens):
                if stage.is_first:
                    given = {"input_ids": torch.zeros((1, count), dtype=torch.long)}
                else:
                    given = {"inputs_embeds": torch.ones((1, count, stage.config.hidden_size), dtype=stage.dtype)}
                positions = torch.arange(start, start + count)[None]
                hidden = stage.base(**given, **cache, position_ids=positions, use_cache=True).last_hidden_state
                if stage.head is not None:
                    stage.head(hidden[:, -1:]).argmax(-1).item()
                stamps.append(time.perf_counter())
                start, count = start + count, 1
        return _Run(stamps[1] - stamps[0], stamps[-1] - stamps[1])

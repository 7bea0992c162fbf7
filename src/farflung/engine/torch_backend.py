"""``StageBackend`` on PyTorch: transformers' own layers, our attention, KV pool and linear kernels.

The event loop opens and closes sessions and hands over steps; everything else, codecs and sampling included, happens in the
compute thread, one step at a time. A session that is closed while its step runs keeps its cells until the step has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from farflung.core.errors import ProtocolViolation, SessionRefused, UsageError
from farflung.core.ids import ModelDigest, SessionId, short
from farflung.core.model import LayerRange, ModelSpec
from farflung.engine.backend import SessionSpec, StageWork, StepReport
from farflung.engine.blocked_linear import block_linears
from farflung.engine.compute import Compute, ComputeThread, InlineCompute
from farflung.engine.kernel_plan import Quantised, kernel_plan
from farflung.engine.kv_pool import Extents, SessionCells
from farflung.engine.kv_tensors import KvTensors
from farflung.engine.linear import swap_linears
from farflung.engine.loader import Finish, StageModule, load_stage
from farflung.engine.norms import fuse_norms
from farflung.engine.packed_step import OpenSession, PackedStep, context_tokens
from farflung.engine.recipe import learn_recipe
from farflung.engine.shared_inputs import shared_inputs
from farflung.engine.skeleton import Config
from farflung.engine.source import ModelSource, Progress
from farflung.engine.tail import LogitsHook, Tail
from farflung.sampling import SessionSampler, prepare
from farflung.wire.codec import codec as codec_named


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """How a backend computes.

    Attributes:
        kv_tokens: KV cells in all; their memory is taken at once.
        threads: OpenMP workers; None leaves torch's choice.
        inline: compute on the event loop instead of a thread (virtual clocks).
        pack: use pre-packed bf16 weights and fp32 weights in blocks where they are faster here.
        quantised: round the weights of large linear maps to int8 or int4 while loading; the stage's dtype is bf16 then.
        weight_bytes: what the linear maps may take; None: no bound. Where int4 weights leave room in it, they get an int8 copy,
            with which windows of many tokens are several times faster.
        on_logits: told, in the compute thread, the session, some wanted slots (at most ``HEAD_ROWS``) and their fp32 logits
            [slots, vocab]; for exactness checks and audits.
    """

    kv_tokens: int
    threads: int | None = None
    inline: bool = False
    pack: bool = True
    quantised: Quantised | None = None
    weight_bytes: int | None = None
    on_logits: LogitsHook | None = None


def load_backend(
    source: ModelSource,
    layers: LayerRange,
    dtype: torch.dtype,
    config: BackendConfig,
    *,
    progress: Progress | None = None,
    expected_digest: ModelDigest | None = None,
) -> TorchBackend:
    """Loads a layer range and makes it compute. Raises what ``load_stage`` raises."""
    if config.quantised is not None and dtype != torch.bfloat16:
        raise UsageError(f"{config.quantised} weights go with bf16 activations, not {dtype}")
    finish = None
    if dtype == torch.bfloat16 and (config.pack or config.quantised is not None):
        _set_threads(config)  # kernels are measured with as many
        finish = _finish(source.config(), layers, config)
    stage = load_stage(source, layers, dtype, progress=progress, expected_digest=expected_digest, finish=finish)
    return TorchBackend(stage, source.spec(), config)


def _finish(model: Config, layers: LayerRange, config: BackendConfig) -> Finish:
    """Gives each layer and the head their kernels as they are loaded. Raises UnsupportedModel."""
    found = shared_inputs(model, layers)
    plan = kernel_plan(config.quantised, weights=found.weights, budget=config.weight_bytes)

    def finish(module: nn.Module, layer: int | None) -> nn.Module:
        fuse_norms(module)
        groups = () if layer is None else found.groups[layer]
        return swap_linears(module, plan, groups, is_head=layer is None)

    return finish


def _set_threads(config: BackendConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)


class TorchBackend:
    """See ``StageBackend``."""

    def __init__(self, stage: StageModule, spec: ModelSpec, config: BackendConfig) -> None:
        """Takes ``stage`` over: its attention and linear modules are replaced. Raises UnsupportedModel."""
        self._spec = spec
        self._config = config
        self._range = stage.layer_range
        self._dtype = stage.dtype
        self._is_last = stage.is_last
        _set_threads(config)
        if config.pack:
            block_linears(stage.model)
        self._recipe = learn_recipe(stage)
        if self._is_last:
            prepare(spec.vocab_size)
        kv = KvTensors(self._recipe.shapes, config.kv_tokens, stage.dtype)
        tail = None if self._recipe.exit is None else Tail(self._recipe.exit, config.on_logits)
        self._packed = PackedStep(self._recipe, kv, self._range, width=spec.hidden_size, dtype=stage.dtype, tail=tail)
        self._context = min(spec.context_tokens, self._recipe.limit or spec.context_tokens)
        self._extents = Extents(config.kv_tokens)
        self._sessions: dict[SessionId, OpenSession] = {}
        self._running: frozenset[SessionId] = frozenset()
        self._closed_while_running: list[OpenSession] = []
        setup = partial(_set_threads, config)
        self._compute: Compute = InlineCompute() if config.inline else ComputeThread("farflung-compute", setup)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def layers(self) -> LayerRange:
        return self._range

    @property
    def engine_class(self) -> str:
        return f"torch-{self._config.quantised or {torch.float32: 'fp32', torch.bfloat16: 'bf16'}[self._dtype]}"

    @property
    def kv_tokens(self) -> int:
        return self._extents.size

    @property
    def kv_free_tokens(self) -> int:
        return self._extents.largest_free

    def open(self, spec: SessionSpec) -> None:
        if spec.session in self._sessions:
            raise SessionRefused(f"session {short(spec.session)} is open already")
        if spec.lease_tokens < 1:
            raise SessionRefused(f"a KV lease of {spec.lease_tokens} tokens holds nothing", hint="ask for at least one token")
        tokens, limit = context_tokens(spec), self._recipe.limit
        if limit is not None and tokens > limit:
            raise SessionRefused(
                f"{self._spec.name} is run here for up to {limit} tokens, not {tokens}: "
                "from there on its attention goes by chunks",
                hint="ask for fewer tokens",
            )
        for name in (spec.codec, spec.codec_out or spec.codec):
            codec_named(name)  # raises CodecError for an unknown one
        biased = max((token for token, _ in spec.sampling.logit_bias), default=0)
        if biased >= self._spec.vocab_size:
            raise SessionRefused(f"logit_bias names token {biased}, the vocabulary has {self._spec.vocab_size}")
        base = self._extents.reserve(spec.lease_tokens)
        sampler = SessionSampler(spec.sampling, spec.prompt_tokens, self._spec.vocab_size) if self._is_last else None
        self._sessions[spec.session] = OpenSession(spec, base, SessionCells(spec.lease_tokens, self._context), sampler)

    def close(self, session: SessionId) -> None:
        found = self._sessions.pop(session, None)
        if found is None:
            return
        if session in self._running:
            self._closed_while_running.append(found)
        else:
            self._extents.release(found.base, found.spec.lease_tokens)

    async def step(self, work: Sequence[StageWork]) -> StepReport:
        if self._running:
            raise ProtocolViolation("a step was asked for while another runs")
        sessions = [self._sessions.get(item.session) for item in work]
        self._running = frozenset(item.session for item in work)
        try:
            return await self._compute.run(lambda: self._step(work, sessions))
        finally:
            self._running = frozenset()
            for closed in self._closed_while_running:
                self._extents.release(closed.base, closed.spec.lease_tokens)
            self._closed_while_running.clear()

    async def aclose(self) -> None:
        await self._compute.aclose()

    def _step(self, work: Sequence[StageWork], sessions: Sequence[OpenSession | None]) -> StepReport:
        """In the compute thread."""
        started = self._compute.clock()
        with torch.inference_mode():
            results = self._packed.run(work, sessions)
        return StepReport(results, self._compute.clock() - started)

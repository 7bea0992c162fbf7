"""``StageBackend`` on PyTorch: transformers' own layers, our attention, KV pool and linear kernels.

The event loop opens and closes sessions and hands over steps; everything else, codecs and sampling included, happens in the
compute thread, one step at a time. A session that is closed while its step runs keeps its cells until the step has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from farflung.core.errors import FarflungError, MalformedFrame, ProtocolViolation, SessionRefused, StageFailed
from farflung.core.ids import ModelDigest, SessionId, short
from farflung.core.model import LayerRange, ModelSpec
from farflung.engine import codec
from farflung.engine.attention import BLOCK_ROWS, Segment, StepAttention, max_rows
from farflung.engine.backend import SessionSpec, StageResult, StageWork, StepReport
from farflung.engine.compute import Compute, ComputeThread, InlineCompute
from farflung.engine.kv_pool import Extents, NewRows, SessionCells
from farflung.engine.kv_tensors import KvTensors
from farflung.engine.linear import block_linears, pack_linears
from farflung.engine.loader import StageModule, load_stage
from farflung.engine.recipe import learn_recipe
from farflung.engine.source import ModelSource, Progress
from farflung.sampling.sampler import sample_rows
from farflung.wire.codec import codec as codec_named

HEAD_ROWS = 64
"""Wanted rows that go through the head at a time: their logits are as wide as the vocabulary."""

LogitsHook = Callable[[SessionId, tuple[int, ...], torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """How a backend computes.

    Attributes:
        kv_tokens: KV cells in all; their memory is taken at once.
        threads: OpenMP workers; None leaves torch's choice.
        inline: compute on the event loop instead of a thread (virtual clocks).
        pack: use pre-packed bf16 weights and fp32 weights in blocks where they are faster here.
        on_logits: told, in the compute thread, the session, some wanted slots (at most ``HEAD_ROWS``) and their fp32 logits
            [slots, vocab]; for exactness checks and audits.
    """

    kv_tokens: int
    threads: int | None = None
    inline: bool = False
    pack: bool = True
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
    stage = load_stage(source, layers, dtype, progress=progress, expected_digest=expected_digest)
    return TorchBackend(stage, source.spec(), config)


@dataclass(frozen=True)
class _Session:
    spec: SessionSpec
    base: int
    cells: SessionCells


@dataclass(frozen=True)
class _Part:
    """One window that goes into the packed step: ``index`` in the step's work, its input, where its rows went."""

    index: int
    session: _Session
    work: StageWork
    input: torch.Tensor
    rows: NewRows


@dataclass(frozen=True)
class _Piece:
    """Rows of one window that go through the layers in one pass."""

    session: _Session
    input: torch.Tensor
    rows: NewRows


class TorchBackend:
    """See ``StageBackend``."""

    def __init__(self, stage: StageModule, spec: ModelSpec, config: BackendConfig) -> None:
        """Takes ``stage`` over: its attention and linear modules are replaced. Raises UnsupportedModel."""
        self._spec = spec
        self._config = config
        self._range = stage.layer_range
        self._dtype = stage.dtype
        self._is_first, self._is_last = stage.is_first, stage.is_last
        self._set_threads()
        if config.pack:
            pack_linears(stage.model)
            block_linears(stage.model)
        self._recipe = learn_recipe(stage)
        self._kv = KvTensors(self._recipe.shapes, config.kv_tokens, stage.dtype)
        self._extents = Extents(config.kv_tokens)
        self._sessions: dict[SessionId, _Session] = {}
        self._running: frozenset[SessionId] = frozenset()
        self._closed_while_running: list[_Session] = []
        self._compute: Compute = InlineCompute() if config.inline else ComputeThread("farflung-compute", self._set_threads)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def layers(self) -> LayerRange:
        return self._range

    @property
    def engine_class(self) -> str:
        return {torch.float32: "torch-fp32", torch.bfloat16: "torch-bf16"}[self._dtype]

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
        codec_named(spec.codec)  # raises CodecError for an unknown name
        base = self._extents.reserve(spec.lease_tokens)
        self._sessions[spec.session] = _Session(spec, base, SessionCells(spec.lease_tokens))

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

    def _set_threads(self) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)

    # In the compute thread from here on.

    def _step(self, work: Sequence[StageWork], sessions: Sequence[_Session | None]) -> StepReport:
        started = self._compute.clock()
        results: list[StageResult | None] = [None] * len(work)
        parts: list[_Part] = []
        with torch.inference_mode():
            for index, (item, session) in enumerate(zip(work, sessions, strict=True)):
                try:
                    if session is None:
                        raise ProtocolViolation(f"session {short(item.session)} is not open here")
                    with self._memory_checked():
                        rows = self._read(item, session)
                    parts.append(_Part(index, session, item, rows, session.cells.apply(item.runs, item.commit)))
                except FarflungError as error:
                    results[index] = StageResult(session=item.session, error=error)
            filled = [part for part in parts if part.rows.slots]
            hidden, failed = None, None
            try:
                with self._memory_checked():
                    hidden = self._forward(filled) if filled else None
            except StageFailed as error:
                failed = error
            start = 0
            for part in parts:
                stop = start + len(part.rows.slots)
                try:
                    if failed is not None and part.rows.slots:
                        raise failed
                    with self._memory_checked():
                        results[part.index] = self._finish(part, None if hidden is None else hidden[0, start:stop])
                except FarflungError as error:
                    results[part.index] = StageResult(session=part.work.session, error=error)
                start = stop
        return StepReport(tuple(result for result in results if result is not None), self._compute.clock() - started)

    def _read(self, item: StageWork, session: _Session) -> torch.Tensor:
        """Token ids int64 [rows] or activations [rows, width]."""
        count = sum(run.count for run in item.runs)
        if self._is_first:
            ids = np.zeros(0, np.int32) if item.token_ids is None else item.token_ids
            if ids.shape != (count,):
                raise MalformedFrame(f"{count} slots came with {ids.size} token ids")
            return torch.from_numpy(ids.astype(np.int64))
        if not count:
            return torch.empty((0, self._spec.hidden_size), dtype=self._dtype)
        rows = codec.decode(session.spec.codec, item.rows or b"", self._spec.hidden_size, dtype=self._dtype)
        if len(rows) != count:
            raise MalformedFrame(f"{count} slots came with {len(rows)} rows of activations")
        return rows

    def _forward(self, parts: Sequence[_Part]) -> torch.Tensor:
        """All rows of the step through the stage's layers: [1, rows, width]."""
        passes = [self._pass(pieces) for pieces in _passes(parts)]
        return passes[0] if len(passes) == 1 else torch.cat(passes, 1)

    def _pass(self, pieces: Sequence[_Piece]) -> torch.Tensor:
        segments: list[Segment] = []
        start = 0
        for piece in pieces:
            segments.append(Segment(start, piece.session.base, piece.rows, piece.session.cells, self._dtype))
            start += len(piece.rows.slots)
        positions = torch.from_numpy(np.concatenate([piece.rows.positions for piece in pieces]))[None]
        cells = torch.from_numpy(np.concatenate([piece.rows.cells + piece.session.base for piece in pieces]))
        packed = pieces[0].input[None] if len(pieces) == 1 else torch.cat([piece.input for piece in pieces])[None]
        hidden = self._recipe.entry(packed, positions) if self._recipe.entry is not None else packed
        return self._recipe.run_layers(hidden, positions, StepAttention(self._kv, cells, segments))

    def _finish(self, part: _Part, hidden: torch.Tensor | None) -> StageResult:
        session = part.work.session
        if hidden is None or not len(hidden):
            return StageResult(session=session, rows=None if self._is_last else b"")
        if not bool(torch.isfinite(hidden).all()):
            raise StageFailed(
                f"layers {self._range} gave activations that are not finite for session {short(session)}",
                hint="a damaged input or a dtype too narrow for this model; try fp32",
            )
        if not self._is_last:
            return StageResult(session=session, rows=codec.encode(part.session.spec.codec, hidden))
        return StageResult(session=session, tokens=self._sample(part, hidden))

    def _sample(self, part: _Part, hidden: torch.Tensor) -> tuple[int, ...]:
        want = part.work.want
        if not want or self._recipe.exit is None:
            return ()
        index = {slot: row for row, slot in enumerate(part.rows.slots)}
        chosen = [index[slot] for slot in want]
        tokens: list[int] = []
        for start in range(0, len(want), HEAD_ROWS):
            some = chosen[start : start + HEAD_ROWS]
            logits = self._recipe.exit(hidden[None, some])[0].float()
            if self._config.on_logits is not None:
                self._config.on_logits(part.work.session, want[start : start + HEAD_ROWS], logits)
            next_positions = [int(part.rows.positions[row]) + 1 for row in some]
            tokens += sample_rows(logits.numpy(), part.session.spec.sampling, next_positions)
        return tuple(tokens)

    @contextmanager
    def _memory_checked(self) -> Iterator[None]:
        """Raises StageFailed for memory that cannot be had: the sessions of the step end, the node goes on."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise StageFailed(
                f"layers {self._range} have not enough memory for a window: {str(error).partition(chr(10))[0]}",
                hint="send shorter windows, or choose a node with more memory",
            ) from error


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU allocator of torch has no exception type of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _passes(parts: Sequence[_Part]) -> Iterator[list[_Piece]]:
    """The rows of a step, in order, in groups that go through the layers together.

    A long window is computed as several short ones, which keeps activations and masks bounded however long it is. The later
    rows see the keys of the earlier ones in the pool, as they see those of earlier windows.
    """
    group: list[_Piece] = []
    room = BLOCK_ROWS
    for part in parts:
        count, start = len(part.rows.slots), 0
        most = max_rows(part.session.cells.high)
        while start < count:
            if not room:
                yield group
                group, room = [], BLOCK_ROWS
            stop = min(count, start + min(most, room))
            group.append(_Piece(part.session, part.input[start:stop], part.rows.part(start, stop)))
            room = room - (stop - start) if stop == count else 0
            start = stop
    if group:
        yield group

"""``StageBackend`` on PyTorch: transformers' own layers, our attention, KV pool and linear kernels.

The event loop opens and closes sessions and hands over steps; everything else, codecs and sampling included, happens in the
compute thread, one step at a time. A session that is closed while its step runs keeps its cells until the step has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch

from farflung.core.errors import FarflungError, MalformedFrame, ProtocolViolation, SessionRefused, StageFailed
from farflung.core.ids import ModelDigest, SessionId, short
from farflung.core.model import LayerRange, ModelSpec
from farflung.engine.attention import StepAttention
from farflung.engine.backend import SessionSpec, StageResult, StageWork, StepReport
from farflung.engine.batch_codec import decode_each, encode_each
from farflung.engine.compute import Compute, ComputeThread, InlineCompute
from farflung.engine.kv_pool import Extents, NewRows, SessionCells
from farflung.engine.kv_tensors import KvTensors
from farflung.engine.linear import block_linears, pack_linears
from farflung.engine.loader import StageModule, load_stage
from farflung.engine.recipe import learn_recipe
from farflung.engine.segments import BLOCK_ROWS, PassPlan, Segment, max_rows
from farflung.engine.source import ModelSource, Progress
from farflung.sampling import Sampled, SessionSampler, prepare
from farflung.wire.codec import codec as codec_named
from farflung.wire.frame import Buffer

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
    """``sampler`` is there at the tail alone."""

    spec: SessionSpec
    base: int
    cells: SessionCells
    sampler: SessionSampler | None


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
        if self._is_last:
            prepare(spec.vocab_size)
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
        if self._recipe.limit is not None and _context(spec) > self._recipe.limit:
            raise SessionRefused(
                f"{self._spec.name} is run here for up to {self._recipe.limit} tokens, not {_context(spec)}: from there on "
                "its attention goes by chunks",
                hint="ask for fewer tokens",
            )
        codec_named(spec.codec)  # raises CodecError for an unknown name
        biased = max((token for token, _ in spec.sampling.logit_bias), default=0)
        if biased >= self._spec.vocab_size:
            raise SessionRefused(f"logit_bias names token {biased}, the vocabulary has {self._spec.vocab_size}")
        base = self._extents.reserve(spec.lease_tokens)
        sampler = SessionSampler(spec.sampling, spec.prompt_tokens, self._spec.vocab_size) if self._is_last else None
        self._sessions[spec.session] = _Session(spec, base, SessionCells(spec.lease_tokens), sampler)

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

        def failed(index: int, error: FarflungError) -> None:
            results[index] = StageResult(session=work[index].session, error=error)

        with torch.inference_mode():
            parts: list[_Part] = []
            for index, (item, session, rows) in enumerate(zip(work, sessions, self._read(work, sessions), strict=True)):
                try:
                    if session is None:
                        raise ProtocolViolation(f"session {short(item.session)} is not open here")
                    if isinstance(rows, FarflungError):
                        raise rows
                    parts.append(_Part(index, session, item, rows, _apply(session, item)))
                except FarflungError as error:
                    failed(index, error)
            for part in parts:
                if not part.rows.slots:
                    results[part.index] = StageResult(session=part.work.session, rows=None if self._is_last else b"")
            # Short windows first, in the order of the pool: so those that share a call of attention are neighbours.
            filled = sorted(
                (part for part in parts if part.rows.slots), key=lambda part: (len(part.rows.slots), part.session.base)
            )
            if filled:
                try:
                    with self._memory_checked():
                        hidden = self._forward(filled)[0].split([len(part.rows.slots) for part in filled])
                        finished = self._finish(filled, hidden)
                except StageFailed as error:
                    for part in filled:
                        failed(part.index, error)
                else:
                    for part, result in zip(filled, finished, strict=True):
                        results[part.index] = result
            self._clear_failed(parts, results)
        return StepReport(tuple(result for result in results if result is not None), self._compute.clock() - started)

    def _clear_failed(self, parts: Sequence[_Part], results: Sequence[StageResult | None]) -> None:
        """What a failed window wrote may not be finite; see ``KvTensors``."""
        for part in parts:
            result = results[part.index]
            if result is not None and result.error is not None:
                self._kv.clear(part.session.base, part.session.cells.size)

    def _read(
        self, work: Sequence[StageWork], sessions: Sequence[_Session | None]
    ) -> list[torch.Tensor | FarflungError | None]:
        """Token ids int64 [rows] or activations [rows, width] of each item; None where the session is not open."""
        found: list[torch.Tensor | FarflungError | None] = [None] * len(work)
        coded: list[tuple[int, str, Buffer, int]] = []
        for index, (item, session) in enumerate(zip(work, sessions, strict=True)):
            count = sum(run.count for run in item.runs)
            if session is None:
                continue
            if self._is_first:
                found[index] = _ids(item, count)
            elif count:
                coded.append((index, session.spec.codec, item.rows or b"", count))
            else:
                found[index] = torch.empty((0, self._spec.hidden_size), dtype=self._dtype)
        if coded:
            indices, names, buffers, counts = zip(*coded, strict=True)
            try:
                with self._memory_checked():
                    decoded = decode_each(names, buffers, counts, self._spec.hidden_size, self._dtype)
            except StageFailed as error:
                decoded = [error] * len(coded)
            for index, rows in zip(indices, decoded, strict=True):
                found[index] = rows
        return found

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
        attention = StepAttention(self._kv, cells, PassPlan(segments, self._dtype))
        return self._recipe.run_layers(hidden, positions, attention, self._contexts(pieces))

    def _contexts(self, pieces: Sequence[_Piece]) -> torch.Tensor | None:
        """The length that fixes each row's rotary factors; None where they depend on none."""
        if not self._recipe.by_length:
            return None
        return torch.tensor([_context(piece.session.spec) for piece in pieces for _ in piece.rows.slots])

    def _finish(self, parts: Sequence[_Part], hidden: Sequence[torch.Tensor]) -> list[StageResult]:
        """Results of windows whose activations, each [rows, width], have passed the layers."""
        is_finite = [bool(rows.isfinite().all()) for rows in hidden]
        good = [index for index, finite in enumerate(is_finite) if finite]
        done = self._results([parts[index] for index in good], [hidden[index] for index in good])
        results = dict(zip(good, done, strict=True))
        return [results.get(index) or self._not_finite(part) for index, part in enumerate(parts)]

    def _not_finite(self, part: _Part) -> StageResult:
        error = StageFailed(
            f"layers {self._range} gave activations that are not finite for session {short(part.work.session)}",
            hint="a damaged input or a dtype too narrow for this model; try fp32",
        )
        return StageResult(session=part.work.session, error=error)

    def _results(self, parts: Sequence[_Part], hidden: Sequence[torch.Tensor]) -> list[StageResult]:
        sessions = [part.work.session for part in parts]
        if self._is_last:
            tokens = self._answer(parts, hidden)
            return [
                StageResult(session=session, error=found)
                if isinstance(found, FarflungError)
                else StageResult(
                    session=session,
                    tokens=tuple(sampled.token for sampled in found),
                    logprobs=tuple(sampled.logprob for sampled in found if sampled.logprob is not None),
                )
                for session, found in zip(sessions, tokens, strict=True)
            ]
        coded = encode_each([part.session.spec.codec for part in parts], hidden)
        return [
            StageResult(session=session, error=found)
            if isinstance(found, FarflungError)
            else StageResult(session=session, rows=found)
            for session, found in zip(sessions, coded, strict=True)
        ]

    def _answer(self, parts: Sequence[_Part], hidden: Sequence[torch.Tensor]) -> list[list[Sampled] | FarflungError]:
        """The token after each wanted slot of each part. All parts share a pass of the head: its weights are read once."""
        wanted: list[tuple[int, int]] = []  # part, row of its window
        for number, part in enumerate(parts):
            row_of = {slot: row for row, slot in enumerate(part.rows.slots)}
            wanted += ((number, row_of[slot]) for slot in part.work.want)
        answers: list[list[Sampled] | FarflungError] = [[] for _ in parts]
        for start in range(0, len(wanted), HEAD_ROWS):
            some = wanted[start : start + HEAD_ROWS]
            logits = self._logits(torch.stack([hidden[number][row] for number, row in some]))
            first = 0
            for number, group in groupby(some, key=itemgetter(0)):
                rows = [row for _, row in group]
                answer = answers[number]
                if not isinstance(answer, FarflungError):
                    try:
                        answer += self._sample(parts[number], rows, logits[first : first + len(rows)])
                    except FarflungError as error:
                        answers[number] = error
                first += len(rows)
        return answers

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [rows, vocab] of activations [rows, width], at the tail."""
        if self._recipe.exit is None:
            raise ProtocolViolation(f"layers {self._range} have no head")
        return self._recipe.exit(hidden[None])[0].float()

    def _sample(self, part: _Part, rows: Sequence[int], logits: torch.Tensor) -> list[Sampled]:
        """The token after each of ``rows`` of the part's window, whose logits are fp32 [rows, vocab]."""
        slots = tuple(part.rows.slots[row] for row in rows)
        if self._config.on_logits is not None:
            self._config.on_logits(part.work.session, slots, logits)
        if part.session.sampler is None:
            raise ProtocolViolation(f"layers {self._range} are no tail")
        return part.session.sampler.sample(logits.numpy(), slots, [int(part.rows.positions[row]) for row in rows])

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


def _apply(session: _Session, item: StageWork) -> NewRows:
    """Grows the session's tree by a window, and what its sampler knows of it."""
    if session.sampler is None:
        return session.cells.apply(item.runs, item.commit)
    session.sampler.check(item.token_ids, sum(run.count for run in item.runs))
    rows = session.cells.apply(item.runs, item.commit)
    session.sampler.advance(rows.slots, item.token_ids, session.cells.tree)
    return rows


def _ids(item: StageWork, count: int) -> torch.Tensor | FarflungError:
    ids = np.zeros(0, np.int32) if item.token_ids is None else item.token_ids
    if ids.shape != (count,):
        return MalformedFrame(f"{count} slots came with {ids.size} token ids")
    return torch.from_numpy(ids.astype(np.int64))


def _context(spec: SessionSpec) -> int:
    return spec.context_tokens or spec.lease_tokens


def _is_out_of_memory(error: Exception) -> bool:
    """The CPU allocator of torch has no exception type of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _pool_order(part: _Part) -> tuple[int, int]:
    return len(part.rows.slots), part.session.base


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

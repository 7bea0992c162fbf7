"""One packed step: windows of several sessions go through a stage's layers together, in the compute thread.

What is wrong with one window stands in its own result. Memory that cannot be had, or a kernel that gives up, fails all windows
of the step, and no more: their sessions end, the node goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from farflung.core.errors import FarflungError, MalformedFrame, ProtocolViolation, StageFailed
from farflung.core.ids import SessionId, short
from farflung.core.model import LayerRange
from farflung.engine.attention import StepAttention
from farflung.engine.backend import SessionSpec, StageResult, StageWork
from farflung.engine.batch_codec import decode_each, encode_each
from farflung.engine.kv_pool import NewRows, SessionCells
from farflung.engine.kv_tensors import KvTensors
from farflung.engine.layer_calls import Recipe
from farflung.engine.segments import BLOCK_ROWS, PassPlan, Segment, max_rows
from farflung.engine.tail import Tail, Wanted
from farflung.sampling import SessionSampler
from farflung.wire.frame import Buffer

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class OpenSession:
    """A session that has a lease: its extent of the pool begins at cell ``base``. ``sampler`` is there at the tail alone."""

    spec: SessionSpec
    base: int
    cells: SessionCells
    sampler: SessionSampler | None

    @property
    def codec_out(self) -> str:
        return self.spec.codec_out or self.spec.codec


@dataclass(frozen=True)
class _Part:
    """One window that goes into the step: ``index`` in the step's work, its input, where its rows went."""

    index: int
    session: OpenSession
    work: StageWork
    input: torch.Tensor
    rows: NewRows


@dataclass(frozen=True)
class _Piece:
    """Rows of one window that go through the layers in one pass."""

    session: OpenSession
    input: torch.Tensor
    rows: NewRows


class PackedStep:
    """Runs steps of one stage.

    Args:
        recipe: how its layers are called.
        kv: keys and values of all sessions.
        layers: which layers, for errors.
        width: values of a row of activations.
        dtype: of weights and activations.
        tail: makes tokens of the last layer's rows; None where rows go on to another stage.
    """

    def __init__(
        self, recipe: Recipe, kv: KvTensors, layers: LayerRange, *, width: int, dtype: torch.dtype, tail: Tail | None
    ) -> None:
        self._recipe = recipe
        self._kv = kv
        self._layers = layers
        self._width = width
        self._dtype = dtype
        self._tail = tail

    def run(self, work: Sequence[StageWork], sessions: Sequence[OpenSession | None]) -> tuple[StageResult, ...]:
        """Results in the order of ``work``, of which ``sessions`` says whose each is: None where it is not open. The caller has
        turned gradients off."""
        results: list[StageResult | None] = [None] * len(work)

        def failed(index: int, error: FarflungError) -> None:
            results[index] = StageResult(session=work[index].session, error=error)

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
                results[part.index] = StageResult(session=part.work.session, rows=None if self._tail is not None else b"")
        # Short windows first, in the order of the pool: so those that share a call of attention are neighbours.
        filled = sorted((part for part in parts if part.rows.slots), key=_pool_order)
        if filled:
            try:
                with self._faults_told([part.work.session for part in filled]):
                    finished = self._finish(filled, self._forward(filled)[0])
            except StageFailed as error:
                for part in filled:
                    failed(part.index, error)
            else:
                for part, result in zip(filled, finished, strict=True):
                    results[part.index] = result
        self._clear_failed(parts, results)
        return tuple(
            self._no_result(item.session) if result is None else result for item, result in zip(work, results, strict=True)
        )

    def _no_result(self, session: SessionId) -> StageResult:
        """Never, as far as is known; were there one less, those after it would go to the wrong sessions."""
        error = StageFailed(f"layers {self._layers} gave no result for session {short(session)}")
        return StageResult(session=session, error=error)

    def _clear_failed(self, parts: Sequence[_Part], results: Sequence[StageResult | None]) -> None:
        """What a failed window wrote may not be finite; see ``KvTensors``."""
        for part in parts:
            result = results[part.index]
            if result is not None and result.error is not None:
                self._kv.clear(part.session.base, part.session.cells.high)

    def _read(
        self, work: Sequence[StageWork], sessions: Sequence[OpenSession | None]
    ) -> list[torch.Tensor | FarflungError | None]:
        """Token ids int64 [rows] or activations [rows, width] of each item; None where the session is not open."""
        found: list[torch.Tensor | FarflungError | None] = [None] * len(work)
        coded: list[tuple[int, str, Buffer, int]] = []
        for index, (item, session) in enumerate(zip(work, sessions, strict=True)):
            count = sum(run.count for run in item.runs)
            if session is None:
                continue
            if self._recipe.entry is not None:
                found[index] = _ids(item, count)
            elif count:
                coded.append((index, session.spec.codec, item.rows or b"", count))
            else:
                found[index] = torch.empty((0, self._width), dtype=self._dtype)
        if coded:
            indices, names, buffers, counts = zip(*coded, strict=True)
            try:
                with self._faults_told([work[index].session for index in indices]):
                    decoded = decode_each(names, buffers, counts, self._width, self._dtype)
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
        return torch.tensor([context_tokens(piece.session.spec) for piece in pieces for _ in piece.rows.slots])

    def _finish(self, parts: Sequence[_Part], hidden: torch.Tensor) -> list[StageResult]:
        """Results of windows whose activations, [rows of all, width], have passed the layers."""
        by_part = hidden.split([len(part.rows.slots) for part in parts])
        if bool(hidden.isfinite().all()):
            return self._results(parts, by_part)
        good = [index for index, rows in enumerate(by_part) if bool(rows.isfinite().all())]
        done = self._results([parts[index] for index in good], [by_part[index] for index in good])
        results = dict(zip(good, done, strict=True))
        return [results.get(index) or self._not_finite(part) for index, part in enumerate(parts)]

    def _not_finite(self, part: _Part) -> StageResult:
        error = StageFailed(
            f"layers {self._layers} gave activations that are not finite for session {short(part.work.session)}",
            hint="a damaged input or a dtype too narrow for this model; try fp32",
        )
        return StageResult(session=part.work.session, error=error)

    def _results(self, parts: Sequence[_Part], hidden: Sequence[torch.Tensor]) -> list[StageResult]:
        sessions = [part.work.session for part in parts]
        if self._tail is not None:
            tokens = self._tail.answer([_wanted(part) for part in parts], hidden)
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
        coded = encode_each([part.session.codec_out for part in parts], hidden)
        return [
            StageResult(session=session, error=found)
            if isinstance(found, FarflungError)
            else StageResult(session=session, rows=found)
            for session, found in zip(sessions, coded, strict=True)
        ]

    @contextmanager
    def _faults_told(self, sessions: Sequence[SessionId]) -> Iterator[None]:
        """Raises StageFailed for what torch raises in a step of ``sessions``, and logs what may be a defect of ours: once for
        each session, as a window that failed ends it."""
        try:
            yield
        except (MemoryError, RuntimeError, IndexError) as error:
            said = str(error).partition("\n")[0]
            if _is_out_of_memory(error):
                raise StageFailed(
                    f"layers {self._layers} have not enough memory for a window: {said}",
                    hint="send shorter windows, or choose a node with more memory",
                ) from error
            names = [short(session) for session in sessions]
            log.error("a step could not be computed", layers=str(self._layers), sessions=names, exc_info=error)
            raise StageFailed(
                f"layers {self._layers} could not compute a window: {type(error).__name__}: {said}",
                hint="the node's log has the whole error",
            ) from error


def context_tokens(spec: SessionSpec) -> int:
    """The length that fixes a session's rotary factors."""
    return spec.context_tokens or spec.lease_tokens


def _wanted(part: _Part) -> Wanted:
    row_of = {slot: row for row, slot in enumerate(part.rows.slots)}
    rows = tuple(row_of[slot] for slot in part.work.want)
    positions = tuple(int(part.rows.positions[row]) for row in rows)
    return Wanted(part.work.session, part.session.sampler, part.work.want, rows, positions)


def _apply(session: OpenSession, item: StageWork) -> NewRows:
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


def _is_out_of_memory(error: Exception) -> bool:
    """Neither the CPU allocator of torch nor oneDNN has an exception type of its own for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("DefaultCPUAllocator", "bad_alloc", "could not create a primitive"))


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

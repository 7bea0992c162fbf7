"""``StageBackend`` without a model: stage times from a T-curve, tokens from recorded paths. For the lab and simulations only.

Rows have the size that the codec gives rows of the stated width, and are zeros but for their last bytes: the key of the path
they end (``engine.replay_tokens``) and its last token. Every stage computes the key anew, from the key it keeps for the parent
slot - its "KV" - and the token, and one that holds another path than its predecessor passes on a key that fits neither. So a
token that comes out right has passed stages which all held the right path, as with a real model.

On a virtual clock a step awaits the loop. In real time it waits in the compute thread: ``asyncio.sleep`` overshoots by 0.9 ms.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from farflung.core.errors import FarflungError, LeaseExceeded, ProtocolViolation, SessionRefused, UsageError
from farflung.core.ids import ModelDigest, SessionId, short
from farflung.core.model import LayerRange, ModelSpec
from farflung.core.sampling import TokenLogprob
from farflung.core.tree import TokenTree
from farflung.core.window import NO_SLOT, SlotRun
from farflung.engine.backend import SessionSpec, StageResult, StageWork, StepReport
from farflung.engine.compute import ComputeThread
from farflung.engine.kv_pool import Extents
from farflung.engine.replay_tokens import KEY_BYTES, TOKEN_BYTES, PathTokens
from farflung.planning.curve import time_ms
from farflung.wire.codec import codec as codec_named

_TRAILER_BYTES = KEY_BYTES + TOKEN_BYTES
_SPIN_S = 0.0003
"""A sleeping thread wakes up to 0.2 ms late; the rest of a step is waited for awake."""


@dataclass(frozen=True, kw_only=True)
class ReplayModel:
    """The shape of a model that is not there.

    Attributes:
        name: what it is called.
        layers, hidden_size, vocab_size, context_tokens: see ``ModelSpec``.
    """

    name: str
    layers: int
    hidden_size: int
    vocab_size: int
    context_tokens: int = 32768

    def spec(self) -> ModelSpec:
        """Its digest stands for these numbers. Raises UsageError where a size is not positive."""
        sizes = (self.layers, self.hidden_size, self.vocab_size, self.context_tokens)
        if min(sizes) < 1:
            raise UsageError(f"model {self.name!r} has a size below 1: layers, hidden, vocab, context are {sizes}")
        digest = blake2b(f"replay {self.name} {sizes}".encode(), digest_size=32).hexdigest()
        return ModelSpec(
            name=self.name,
            family="replay",
            digest=ModelDigest(digest),
            layers=self.layers,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            context_tokens=self.context_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """How a replay backend behaves.

    Attributes:
        curve_ms: time of a step by its tokens, as for ``planning.curve.time_ms``.
        kv_tokens: KV cells in all.
        virtual: steps await the event loop's clock instead of waiting in a thread.
    """

    curve_ms: tuple[tuple[int, float], ...]
    kv_tokens: int
    virtual: bool = False


@dataclass(eq=False)
class _Session:
    """A lease, and the keys of the root and of the alive slots."""

    spec: SessionSpec
    base: int
    keys: dict[int, bytes]
    tree: TokenTree = field(default_factory=TokenTree)


class ReplayBackend:
    """See ``StageBackend``. Sampling options change nothing: tokens depend on the path alone."""

    def __init__(self, spec: ModelSpec, layers: LayerRange, tokens: PathTokens, config: ReplayConfig) -> None:
        """``tokens`` may be shared by backends. Raises UsageError where there is no T-curve, or no such layers."""
        if not config.curve_ms or layers.stop > spec.layers:
            raise UsageError(f"a replay of layers {layers} of {spec.layers} needs a T-curve, and layers that exist")
        self._spec = spec
        self._layers = layers
        self._tokens = tokens
        self._config = config
        self._is_first, self._is_last = layers.start == 0, layers.stop == spec.layers
        self._extents = Extents(config.kv_tokens)
        self._sessions: dict[SessionId, _Session] = {}
        self._running: frozenset[SessionId] = frozenset()
        self._closed_while_running: list[_Session] = []
        self._thread = None if config.virtual else ComputeThread("farflung-replay")

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def layers(self) -> LayerRange:
        return self._layers

    @property
    def engine_class(self) -> str:
        return "replay"

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
        for name in (spec.codec, spec.codec_out or spec.codec):
            if codec_named(name).row_bytes(self._spec.hidden_size) < _TRAILER_BYTES:
                raise SessionRefused(f"a row of {self._spec.hidden_size} values in {name} is too short for a replay")
        base = self._extents.reserve(spec.lease_tokens)
        self._sessions[spec.session] = _Session(spec, base, {NO_SLOT: self._tokens.root})

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
            if self._thread is not None:
                return await self._thread.run(lambda: self._step_in_thread(work, sessions))
            seconds = self._seconds(work)
            await asyncio.sleep(seconds)
            return StepReport(self._results(work, sessions), seconds)
        finally:
            self._running = frozenset()
            for closed in self._closed_while_running:
                self._extents.release(closed.base, closed.spec.lease_tokens)
            self._closed_while_running.clear()

    async def aclose(self) -> None:
        if self._thread is not None:
            await self._thread.aclose()

    def _seconds(self, work: Sequence[StageWork]) -> float:
        """A step of commits alone costs nothing."""
        rows = sum(run.count for item in work for run in item.runs)
        return time_ms(self._config.curve_ms, rows) / 1e3 if rows else 0.0

    def _step_in_thread(self, work: Sequence[StageWork], sessions: Sequence[_Session | None]) -> StepReport:
        started = time.perf_counter()
        until = started + self._seconds(work)
        results = self._results(work, sessions)  # a part of the time that the step is said to take
        if (rest := until - time.perf_counter() - _SPIN_S) > 0:
            time.sleep(rest)  # in the compute thread: the loop goes on
        while time.perf_counter() < until:
            pass
        return StepReport(results, time.perf_counter() - started)

    def _results(self, work: Sequence[StageWork], sessions: Sequence[_Session | None]) -> tuple[StageResult, ...]:
        results = []
        for item, session in zip(work, sessions, strict=True):
            try:
                if session is None:
                    raise ProtocolViolation(f"session {short(item.session)} is not open here")
                results.append(self._compute(item, session))
            except FarflungError as error:
                results.append(StageResult(session=item.session, error=error))
        return tuple(results)

    def _compute(self, item: StageWork, session: _Session) -> StageResult:
        grown, stillborn = session.tree.add(item.runs)
        tree, died = (grown, frozenset[int]()) if item.commit is None else grown.commit(item.commit)
        if stillborn or tree.tokens > session.spec.lease_tokens:
            raise LeaseExceeded(
                f"{tree.tokens} tokens, {len(stillborn)} of them dead, exceed the KV lease of {session.spec.lease_tokens}"
            )
        count = sum(run.count for run in item.runs)
        keys = session.keys
        trailers = self._trailers(item, count, keys, session.spec)
        wanted = tuple(self._tokens.token_after(keys[slot]) for slot in item.want) if self._is_last else ()
        session.tree = tree
        if died or tree.root not in (NO_SLOT, grown.root):
            session.keys = {slot: key for slot, key in keys.items() if slot == tree.root or slot in tree.alive}
        if self._is_last:
            asked = session.spec.sampling.logprobs is not None
            return StageResult(
                session=item.session, tokens=wanted, logprobs=(TokenLogprob(0.0),) * len(wanted) if asked else ()
            )
        return StageResult(session=item.session, rows=self._rows(trailers, session.spec))

    def _trailers(self, item: StageWork, count: int, keys: dict[int, bytes], spec: SessionSpec) -> list[bytes]:
        """What stands at the end of each row that goes out; ``keys`` gets those of the new slots."""
        ids, came = self._read(item, count, spec)
        trailers: list[bytes] = []
        key_after, at = self._tokens.key, 0
        for run in item.runs:
            key = keys[run.parent]
            for slot in _slots(run):
                token = ids[at]
                key = key_after(key, token)
                if came is not None and came[at] != key:
                    key = key_after(key, came[at])  # this stage and the one before hold different paths
                keys[slot] = key
                trailers.append(key + token)
                at += 1
        return trailers

    def _read(self, item: StageWork, count: int, spec: SessionSpec) -> tuple[list[bytes], list[bytes] | None]:
        """Token ids of the rows that came in, and their keys, where they came with some."""
        if self._is_first:
            given = b"" if item.token_ids is None else item.token_ids.astype("<i4", copy=False).tobytes()
            if len(given) != count * TOKEN_BYTES:
                raise ProtocolViolation(f"{len(given)} bytes of token ids are not those of {count} rows")
            return [given[at : at + TOKEN_BYTES] for at in range(0, len(given), TOKEN_BYTES)], None
        rows = memoryview(b"" if item.rows is None else item.rows)
        size = codec_named(spec.codec).row_bytes(self._spec.hidden_size)
        if len(rows) != count * size:
            raise ProtocolViolation(f"{len(rows)} bytes are not {count} rows of {size}")
        ends = [bytes(rows[stop - _TRAILER_BYTES : stop]) for stop in range(size, len(rows) + 1, size)]
        return [end[KEY_BYTES:] for end in ends], [end[:KEY_BYTES] for end in ends]

    def _rows(self, trailers: Sequence[bytes], spec: SessionSpec) -> bytes:
        size = codec_named(spec.codec_out or spec.codec).row_bytes(self._spec.hidden_size)
        if len(trailers) == 1:
            return bytes(size - _TRAILER_BYTES) + trailers[0]
        rows = np.zeros((len(trailers), size), np.uint8)
        rows[:, size - _TRAILER_BYTES :] = np.frombuffer(b"".join(trailers), np.uint8).reshape(-1, _TRAILER_BYTES)
        return rows.tobytes()


def _slots(run: SlotRun) -> range:
    return range(run.first, run.first + run.count)

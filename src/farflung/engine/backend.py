"""The narrow interface between a node and whatever computes its layers.

A backend is told of sessions and handed lists of work; it keeps the KV. It trusts its caller to have checked the rules of the
protocol (slots, commits, leases): what it raises about them is a bug, not a peer's fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from farflung.core.errors import FarflungError
from farflung.core.ids import SessionId
from farflung.core.model import LayerRange, ModelSpec
from farflung.core.sampling import SamplingOptions, TokenLogprob
from farflung.core.window import Commit, SlotRun


@dataclass(frozen=True, kw_only=True)
class SessionSpec:
    """What a backend must know of a session.

    Attributes:
        session: its id.
        lease_tokens: KV cells reserved for it; it never uses more.
        sampling: used by the tail.
        codec: how rows come in, and go out unless ``codec_out`` names another.
        codec_out: how rows go out; empty: as they come in.
        prompt_tokens: of its tokens, how many are the prompt's.
        context_tokens: the length that rotary factors are chosen for; 0: the lease.
    """

    session: SessionId
    lease_tokens: int
    sampling: SamplingOptions
    codec: str
    codec_out: str = ""
    prompt_tokens: int = 0
    context_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """One window to compute for one session.

    Attributes:
        session: an open session.
        commit: applied after the slots of ``runs`` are known and before they are computed; None leaves the root.
        runs: the new slots, all alive; may be empty (a commit alone).
        token_ids: int32 [rows], in the vocabulary: at the first stage, and at the tail where sampling looks back at the text.
        rows: coded activations of all rows, other stages only.
        want: slots whose next token the tail samples, a subset of the new ones.
    """

    session: SessionId
    runs: tuple[SlotRun, ...]
    commit: Commit | None = None
    token_ids: NDArray[np.int32] | None = None
    rows: bytes | memoryview | None = None
    want: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What came of one ``StageWork``.

    Attributes:
        session: whose.
        rows: coded activations of all rows for the next stage; None at the tail.
        tokens: the sampled token after each wanted slot, in the order wanted; tail only.
        logprobs: one per token, where the session's sampling options ask for them.
        error: why this session's window could not be computed (rows that do not decode, activations that are not finite);
            the other results of the step are good all the same.
    """

    session: SessionId
    rows: bytes | None = None
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    error: FarflungError | None = None


@dataclass(frozen=True)
class StepReport:
    """Results in the order of the work, and the time the step took in the compute thread."""

    results: tuple[StageResult, ...]
    compute_s: float


class StageBackend(Protocol):
    """Computes ``layers`` of ``spec``."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def layers(self) -> LayerRange: ...

    @property
    def engine_class(self) -> str:
        """Weight precision and kernel family, e.g. ``torch-bf16``: results are comparable within a class."""

    @property
    def kv_tokens(self) -> int:
        """KV cells in all."""

    @property
    def kv_free_tokens(self) -> int:
        """The largest lease, in KV cells, that would be granted now: where leases are contiguous, the longest free extent."""

    def open(self, spec: SessionSpec) -> None:
        """Reserves KV. Raises SessionRefused, saying what is free, where there is not enough."""

    def close(self, session: SessionId) -> None:
        """Frees the session's KV, after the running step if that uses it. An unknown session is ignored."""

    async def step(self, work: Sequence[StageWork]) -> StepReport:
        """Computes one packed batch, at most one window per session. Never called twice at a time.

        What is wrong with one session's window stands in its result; only a failure of the whole step is raised.
        """

    async def aclose(self) -> None:
        """Frees threads and weights."""

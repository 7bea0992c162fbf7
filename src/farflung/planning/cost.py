"""What a generation over a ring should cost: time to first token, time between tokens, and the floor below which none can be.

All are pure functions of the stages' T-curves, the ring's legs and the size of a coded row. The floor is the sum of one-way
delays, serialisation and stage compute, at the rates that warm links really reach. The expectation adds what the protocol adds:
frame headers, store and forward in fragments, and in a prefill the credit of each edge and jitter that holds back a pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean

from farflung.core.errors import UsageError
from farflung.planning.curve import time_ms

Curve = Sequence[tuple[int, float]]
"""As for ``planning.curve.time_ms``."""

FRAME_BYTES = 80
"""Around the rows of one window: message, fragment header and TLS record, as counted on decode windows."""

ID_BYTES = 4

CHUNKS = (48, 64, 96, 128, 192, 256)
"""Prompt tokens per window that may be chosen. Each window costs the driver some 57 bytes beside the ids: with shorter ones a
prompt of 512 tokens would cost it more than 4,000 bytes of uplink."""

_FLOOR_CHUNKS = (16, 24, 32, *CHUNKS)


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One way between two members of a ring.

    Attributes:
        delay_s: from sending to arrival, on average.
        up_bytes_per_s, down_bytes_per_s: that bytes pass one after the other, as warm streams really reach them; None: at once.
        jitter_std_s: standard deviation of the delay.
        jitter_memory_s: how long delays stay alike.
        fragment_bytes: frames are passed on in pieces of that size.
    """

    delay_s: float = 0.0
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None
    jitter_std_s: float = 0.0
    jitter_memory_s: float = 0.02
    fragment_bytes: int = 16 * 1024

    def serialisation_s(self, size: int) -> float:
        """Of ``size`` bytes at the slower of the two rates."""
        return max(size / rate if rate else 0.0 for rate in (self.up_bytes_per_s, self.down_bytes_per_s))

    def forwarding_s(self, size: int) -> float:
        """What the faster rate adds to that: the last fragment is passed on whole."""
        last = min(size, self.fragment_bytes)
        return min(last / rate if rate else 0.0 for rate in (self.up_bytes_per_s, self.down_bytes_per_s))


@dataclass(frozen=True, kw_only=True)
class Ring:
    """A route as the planner sees it.

    Attributes:
        stages: T-curve of each.
        legs: from the driver to the first stage, between stages, and from the tail to the driver: one more than stages.
        row_bytes: of one coded row between stages.
        credit_bytes: that may be on their way over an edge and not computed; None: no limit.
        credit_lump_bytes: what is computed is returned to the sender in lumps of that size.
        window_cost_bytes: charged for each window beside its rows.
        step_rows: the most rows of a step.
    """

    stages: tuple[Curve, ...]
    legs: tuple[Leg, ...]
    row_bytes: int
    credit_bytes: int | None = None
    credit_lump_bytes: int = 0
    window_cost_bytes: int = 0
    step_rows: int = 256

    def __post_init__(self) -> None:
        if not self.stages or len(self.legs) != len(self.stages) + 1 or self.row_bytes < 1 or self.step_rows < 1:
            raise UsageError(f"{len(self.stages)} stages, {len(self.legs)} legs and rows of {self.row_bytes} bytes are no ring")

    def window_bytes(self, leg: int, tokens: int) -> int:
        """Payload of a window of so many tokens on that leg: ids at first, rows between, ids again."""
        return tokens * (ID_BYTES if leg in (0, len(self.stages)) else self.row_bytes)


@dataclass(frozen=True)
class Cost:
    """Attributes:
    expected_s: what it should take.
    floor_s: what it takes at least.
    """

    expected_s: float
    floor_s: float


def decode_cost(ring: Ring, tokens: int = 1) -> Cost:
    """One traversal of the ring by a window of ``tokens``: of one token, the time between tokens of plain decode."""
    compute_s = sum(time_ms(curve, tokens) for curve in ring.stages) / 1e3
    floor_s = expected_s = compute_s
    for number, leg in enumerate(ring.legs):
        payload = ring.window_bytes(number, tokens)
        size = payload + FRAME_BYTES
        floor_s += leg.delay_s + leg.serialisation_s(payload)
        expected_s += leg.delay_s + leg.serialisation_s(size) + leg.forwarding_s(size)
    return Cost(expected_s, floor_s)


def prefill_cost(ring: Ring, prompt_tokens: int, chunk_tokens: int) -> Cost:
    """The first token of a prompt that goes out in chunks, over warm links, with nobody else there.

    The floor is that of the best chunk size, without the protocol's share.
    """
    if prompt_tokens < 1 or chunk_tokens < 1:
        raise UsageError(f"a prompt of {prompt_tokens} tokens in chunks of {chunk_tokens} is none")
    expected_s = _expected_s(ring, prompt_tokens, chunk_tokens)
    floor_s = min(_pipeline_s(ring, _chunks(prompt_tokens, chunk), None) for chunk in _FLOOR_CHUNKS)
    return Cost(expected_s, min(floor_s, expected_s))


def _expected_s(ring: Ring, prompt_tokens: int, chunk_tokens: int) -> float:
    chunks = _chunks(prompt_tokens, min(chunk_tokens, ring.step_rows))
    draws = _DRAWS if any(leg.jitter_std_s for leg in ring.legs) else 1
    return fmean(_pipeline_s(ring, chunks, Random(draw)) for draw in range(draws))  # noqa: S311 - jitter


LONGEST_LOOKED_AT = 4096

_DRAWS = 32
"""Of jitter, always the same ones: lateness adds up along a pipeline whose legs are all busy, which no formula here tells."""


def choose_chunk(ring: Ring, prompt_tokens: int) -> int:
    """Prompt tokens per window that should bring the first token soonest; of equal ones the most.

    Of a long prompt the first ``LONGEST_LOOKED_AT`` tokens are looked at, some 20 ms of work: beyond, what is best stays so.
    """
    tokens = min(prompt_tokens, LONGEST_LOOKED_AT)
    costs = {chunk: _expected_s(ring, tokens, chunk) for chunk in CHUNKS}
    return min(costs, key=lambda chunk: (costs[chunk], -chunk))


def _chunks(tokens: int, chunk: int) -> list[int]:
    return [min(chunk, tokens - start) for start in range(0, tokens, chunk)]


def _pipeline_s(ring: Ring, chunks: Sequence[int], jitter: Random | None) -> float:
    """When the answer to the last of ``chunks`` is with the driver; ``jitter``: with what protocol and path add.

    Chunks are followed one after another through all stages: what chunk i meets anywhere is decided by those before it.
    """
    edges = [_Edge(ring, number, jitter) for number in range(len(ring.legs))]
    computed = [0.0] * len(ring.stages)
    at = 0.0
    for tokens in chunks:
        at = 0.0
        for number, curve in enumerate(ring.stages):
            at = edges[number].arrival(at, tokens)
            # A stage computes one chunk at a time, and none while the rows of the last one wait for credit.
            began = max(at, computed[number], edges[number + 1].sent if jitter else 0.0)
            at = computed[number] = began + time_ms(curve, tokens) / 1e3
            edges[number].credit.computed(at, ring.window_bytes(number, tokens))
    return edges[-1].arrival(at, 1)


class _Edge:
    """A leg in the course of one prefill: when it is free, how late it is, and what credit is left on it."""

    def __init__(self, ring: Ring, number: int, jitter: Random | None) -> None:
        self._ring = ring
        self._number = number
        self._leg = ring.legs[number]
        self._jitter = jitter
        self._free = self._arrived = 0.0
        self._wander, self._wander_at = 0.0, -math.inf
        self.sent = 0.0
        limited = jitter is not None and ring.credit_bytes is not None and 0 < number < len(ring.stages)
        self.credit = _Credit(ring, self._leg.delay_s) if limited else _NoCredit()

    def arrival(self, ready: float, tokens: int) -> float:
        """When the whole of a window that was ready then has arrived."""
        payload = self._ring.window_bytes(self._number, tokens)
        self.sent = self.credit.may_send(max(ready, self.sent), payload)
        start = max(self.sent, self._free)
        if self._jitter is None:
            self._free = start + self._leg.serialisation_s(payload)
            at = self._free + self._leg.delay_s
        else:
            size = payload + FRAME_BYTES
            self._free = start + self._leg.serialisation_s(size)
            at = self._free + self._leg.delay_s + self._leg.forwarding_s(size)
            at += self._late_s(self._jitter) + held_back_s(self._leg, self._free - start)
        self._arrived = max(self._arrived, at)  # nothing overtakes
        return self._arrived

    def _late_s(self, jitter: Random) -> float:
        """How much later than the mean a fragment arrives that has passed by now (as ``transport.memory_wire``)."""
        leg = self._leg
        if not leg.jitter_std_s:
            return 0.0
        kept = math.exp((self._wander_at - self._free) / leg.jitter_memory_s) if leg.jitter_memory_s else 0.0
        self._wander = kept * self._wander + math.sqrt(1 - kept * kept) * jitter.gauss(0.0, 1.0)
        self._wander_at = self._free
        return max(-leg.delay_s, leg.jitter_std_s * self._wander)


class _NoCredit:
    """No limit."""

    def may_send(self, ready: float, payload: int) -> float:
        return ready

    def computed(self, at: float, payload: int) -> None:
        return


class _Credit(_NoCredit):
    """What the sender of an edge may send: as in ``protocol.credit``."""

    def __init__(self, ring: Ring, back_s: float) -> None:
        self._left = ring.credit_bytes or 0
        self._lump = ring.credit_lump_bytes
        self._cost = ring.window_cost_bytes
        self._back_s = back_s
        self._owed = 0
        self._returns: list[tuple[float, int]] = []

    def may_send(self, ready: float, payload: int) -> float:
        """When the window may go out; it is charged."""
        while self._returns and (self._left <= 0 or self._returns[0][0] <= ready):
            came, size = self._returns.pop(0)
            ready, self._left = max(ready, came), self._left + size
        self._left -= payload + self._cost
        return ready

    def computed(self, at: float, payload: int) -> None:
        """The receiver has computed it."""
        self._owed += payload + self._cost
        if self._owed >= self._lump:
            self._returns.append((at + self._back_s, self._owed))
            self._owed = 0


def held_back_s(leg: Leg, burst_s: float) -> float:
    """How much later than the mean delay the end of a burst arrives, because nothing overtakes what jitter held back before it.

    A fit, within 0.1 deviations, to 1,500 bursts for each of four deviations (5 to 35 ms, memory 20 ms) on a path of
    ``transport.memory_wire`` with a fragment every 1.3 ms. 0 without jitter.
    """
    if not leg.jitter_std_s or not leg.jitter_memory_s or burst_s <= 0:
        return 0.0
    held = leg.jitter_std_s * math.exp(-0.6 * leg.jitter_memory_s / leg.jitter_std_s)
    return held * (1 - math.exp(-2.2 * burst_s / leg.jitter_memory_s))

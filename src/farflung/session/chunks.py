"""How many prompt tokens go into one window: what brings the first token soonest, by what this driver knows of its route.

Stages announce their T-curves. Of the edges between them a driver knows what the timelines of its own windows told: each stage
adds the delay from the one before and the rate at which the one after has seen its bytes arrive.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

from farflung.core.ids import NodeId
from farflung.core.messages import StageTime
from farflung.core.route import Route
from farflung.planning.cost import CHUNKS, Curve, Leg, Ring, choose_chunk
from farflung.protocol.credit import INITIAL_CREDIT_BYTES, RETURN_AT_BYTES, WINDOW_COST_BYTES
from farflung.transport.measure import fragment_bytes_for
from farflung.wire.codec import codec

DEFAULT_CHUNK_TOKENS = 128
"""Where a stage has announced no T-curve."""

UNMEASURED_BYTES_PER_S = 12.5e6
"""What an edge is taken for until it was measured, 100 Mbps: a smaller chunk than the best costs little, a larger one much."""

_EDGES_REMEMBERED = 1024
_CHOICES_REMEMBERED = 256
_PROMPT_STEP = 32


def ring_over(stages: Sequence[Curve], legs: Sequence[Leg], *, codec_name: str, hidden_size: int) -> Ring:
    """The ring of those stages by the protocol's constants. Raises CodecError, and UsageError unless there is one leg more."""
    return Ring(
        stages=tuple(tuple(curve) for curve in stages),
        legs=tuple(legs),
        row_bytes=codec(codec_name).row_bytes(hidden_size),
        credit_bytes=INITIAL_CREDIT_BYTES,
        credit_lump_bytes=RETURN_AT_BYTES,
        window_cost_bytes=WINDOW_COST_BYTES,
    )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is to be sent: so many tokens over that route, and the rows between stages in that codec.

    Attributes:
        curves: T-curve of each node that has announced one.
        round_trips_s: between this driver and nodes, as measured.
    """

    tokens: int
    route: Route
    codec_name: str
    hidden_size: int
    curves: Mapping[NodeId, Curve]
    round_trips_s: Mapping[NodeId, float] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class _Edge:
    """Times in seconds, None where not measured."""

    delay_s: float | None = None
    bytes_per_s: float | None = None


class Chunks:
    """What one driver has learned of the edges of its routes, and what it made of that."""

    def __init__(self) -> None:
        self._edges: dict[tuple[NodeId, NodeId], _Edge] = {}
        self._chosen: dict[tuple[Ring, int], int] = {}

    def learn(self, route: Route, timeline: Sequence[StageTime]) -> None:
        """What became of one window at every stage of ``route``. Anything that cannot be so is passed over."""
        hops = route.hops
        if len(timeline) != len(hops):
            return
        for place in range(1, len(hops)):
            wire_s, rate = timeline[place].wire_ms / 1e3, timeline[place - 1].bytes_per_s
            key = hops[place - 1].node_id, hops[place].node_id
            known = self._edges.pop(key, _Edge())  # put back as the newest
            self._edges[key] = _Edge(
                wire_s if 0 < wire_s < 60 else known.delay_s,
                rate if 0 < rate < math.inf else known.bytes_per_s,
            )
        while len(self._edges) > _EDGES_REMEMBERED:
            del self._edges[next(iter(self._edges))]

    def choose(self, prompt: Prompt) -> int:
        """Prompt tokens per window."""
        hops = prompt.route.hops
        curves = [prompt.curves.get(hop.node_id, ()) for hop in hops]
        if not all(curves):
            return DEFAULT_CHUNK_TOKENS
        if prompt.tokens <= CHUNKS[0]:  # one window in any case
            return CHUNKS[-1]
        ring = ring_over(curves, self._legs(prompt), codec_name=prompt.codec_name, hidden_size=prompt.hidden_size)
        key = ring, -(-prompt.tokens // _PROMPT_STEP)
        found = self._chosen.get(key)
        if found is None:
            if len(self._chosen) >= _CHOICES_REMEMBERED:
                self._chosen.clear()
            found = self._chosen[key] = choose_chunk(ring, key[1] * _PROMPT_STEP)
        return found

    def _legs(self, prompt: Prompt) -> list[Leg]:
        """In round numbers, so that one measurement a little off the last is no other ring."""
        nodes = [hop.node_id for hop in prompt.route.hops]
        ends = [prompt.round_trips_s.get(node, 0.0) / 2 for node in (nodes[0], nodes[-1])]
        between = [self._edges.get((before, after), _Edge()) for before, after in pairwise(nodes)]
        far = max([*ends, *(edge.delay_s or 0.0 for edge in between)])
        legs = [Leg(delay_s=_rounded(ends[0]))]
        for edge in between:
            rate = _rounded(edge.bytes_per_s or UNMEASURED_BYTES_PER_S)
            delay_s = far if edge.delay_s is None else edge.delay_s
            legs.append(Leg(delay_s=_rounded(delay_s), up_bytes_per_s=rate, fragment_bytes=fragment_bytes_for(rate)))
        return [*legs, Leg(delay_s=_rounded(ends[1]))]


def _rounded(value: float) -> float:
    """To eighths of a power of two."""
    if value <= 0:
        return 0.0
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(fraction * 16) / 16, exponent)

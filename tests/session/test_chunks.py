"""The driver's choice of a prompt's chunks: by what stages announce and what its own windows have told it."""

from __future__ import annotations

import pytest

from farflung.core.ids import NodeId
from farflung.core.messages import StageTime
from farflung.core.model import LayerRange
from farflung.core.route import Hop, Route
from farflung.identity.keys import Identity
from farflung.planning.cost import CHUNKS, LONGEST_LOOKED_AT, Leg, choose_chunk, prefill_cost
from farflung.session.chunks import DEFAULT_CHUNK_TOKENS, Chunks, Prompt, ring_over

CURVE = ((1, 13.2), (4096, 832.2))
NODES = [Identity.generate().node_id for _ in range(4)]
ROUTE = Route(hops=tuple(Hop(node, LayerRange(20 * place, 20 * place + 20)) for place, node in enumerate(NODES)))


def prompt(tokens: int = 512, curves: dict[NodeId, tuple[tuple[int, float], ...]] | None = None) -> Prompt:
    curves = dict.fromkeys(NODES, CURVE) if curves is None else curves
    far = {NODES[0]: 0.02, NODES[-1]: 0.02}
    return Prompt(tokens=tokens, route=ROUTE, codec_name="int8", hidden_size=8192, curves=curves, round_trips_s=far)


def timeline(wire_ms: float, bytes_per_s: float) -> list[StageTime]:
    return [StageTime(wire_ms, 0.0, 13.2, 1, bytes_per_s)] * 4


@pytest.mark.parametrize("rate", [2.4e6, 12e6, 120e6, 12e9])
def test_once_the_edges_are_measured_the_choice_is_the_planner_s_best(rate: float) -> None:
    chunks = Chunks()
    chunks.learn(ROUTE, timeline(10.0, rate))
    chosen = chunks.choose(prompt())
    legs = [Leg(delay_s=0.01), *[Leg(delay_s=0.01, up_bytes_per_s=rate)] * 3, Leg(delay_s=0.01)]
    ring = ring_over([CURVE] * 4, legs, codec_name="int8", hidden_size=8192)
    assert prefill_cost(ring, 512, chosen).expected_s <= 1.02 * prefill_cost(ring, 512, choose_chunk(ring, 512)).expected_s


def test_before_that_edges_are_taken_for_slow_ones() -> None:
    assert Chunks().choose(prompt()) == CHUNKS[0]
    quick = Chunks()
    quick.learn(ROUTE, timeline(0.1, 12e9))
    assert quick.choose(prompt()) > CHUNKS[0]


def test_a_stage_without_a_curve_makes_the_default() -> None:
    assert Chunks().choose(prompt(curves=dict.fromkeys(NODES[1:], CURVE))) == DEFAULT_CHUNK_TOKENS


def test_a_short_prompt_goes_out_in_one_window() -> None:
    assert Chunks().choose(prompt(48)) >= 48


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0, 0.0])
def test_what_cannot_be_measured_is_not_believed(wrong: float) -> None:
    chunks, told = Chunks(), Chunks()
    for of in (chunks, told):
        of.learn(ROUTE, timeline(10.0, 2.4e6))
    told.learn(ROUTE, timeline(wrong, wrong))
    told.learn(ROUTE, timeline(10.0, 12e9)[:2])
    assert told.choose(prompt()) == chunks.choose(prompt())


def test_of_a_long_prompt_a_part_is_looked_at_and_nothing_twice() -> None:
    ring = ring_over([CURVE] * 4, [Leg()] * 5, codec_name="int8", hidden_size=8192)
    assert choose_chunk(ring, 32_768) == choose_chunk(ring, LONGEST_LOOKED_AT)
    chunks = Chunks()
    assert chunks.choose(prompt(4010)) == chunks.choose(prompt(4020))
    assert len(chunks._chosen) == 1


def test_edges_and_choices_are_remembered_within_bounds() -> None:
    chunks = Chunks()
    for rate in range(1, 3000):
        nodes = (NodeId(f"{rate:064x}"), *NODES[1:])
        route = Route(hops=tuple(Hop(node, hop.layers) for node, hop in zip(nodes, ROUTE.hops, strict=True)))
        chunks.learn(route, timeline(1.0, float(rate)))
    assert len(chunks._edges) <= 1024

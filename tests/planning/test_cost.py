"""What a generation should cost, and the floor below which none can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import UsageError
from farflung.planning.cost import CHUNKS, FRAME_BYTES, Cost, Leg, Ring, choose_chunk, decode_cost, held_back_s, prefill_cost

CURVE = ((1, 13.2), (4096, 832.2))
"""A quarter of a 70B model in 4 bits: 13 ms and 0.2 ms per token."""
MB = 1e6


def ring(leg: Leg, stages: int = 4, **more: int) -> Ring:
    return Ring(stages=(CURVE,) * stages, legs=(leg,) * (stages + 1), row_bytes=8336, **more)


def test_the_floor_of_a_token_is_delays_and_serialisation_and_compute() -> None:
    cost = decode_cost(ring(Leg(delay_s=0.005, up_bytes_per_s=12.5 * MB)))
    ids, rows = 4 / 12.5e6, 8336 / 12.5e6
    assert cost.floor_s == pytest.approx(5 * 0.005 + 2 * ids + 3 * rows + 4 * 0.0132)
    assert cost.expected_s == pytest.approx(cost.floor_s + 5 * FRAME_BYTES / 12.5e6)


def test_a_prompt_in_one_chunk_passes_every_stage_once() -> None:
    cost = prefill_cost(ring(Leg(delay_s=0.005, up_bytes_per_s=12.5 * MB)), 100, 128)
    rows = (100 * 8336 + FRAME_BYTES) / 12.5e6
    ids = (400 + FRAME_BYTES) / 12.5e6 + (4 + FRAME_BYTES) / 12.5e6
    assert cost.expected_s == pytest.approx(5 * 0.005 + 3 * rows + ids + 4 * 0.033)


def test_chunks_are_computed_by_all_stages_at_once() -> None:
    """Four chunks and four stages without a network: seven steps, not sixteen."""
    assert prefill_cost(ring(Leg()), 512, 128).expected_s == pytest.approx(7 * (0.013 + 128 * 0.0002))


def test_credit_stops_a_sender_until_the_receiver_has_computed() -> None:
    free = ring(Leg(delay_s=0.05, up_bytes_per_s=12.5 * MB), stages=2)
    bound = replace(free, credit_bytes=1024**2, credit_lump_bytes=1024**2 // 4, window_cost_bytes=256)
    assert prefill_cost(bound, 100, 128) == prefill_cost(free, 100, 128)
    # Chunks of 128 rows, 1.07 MB each: the second waits for the first to arrive, to be computed and for word of it.
    waits = prefill_cost(bound, 256, 128).expected_s - prefill_cost(free, 256, 128).expected_s
    step = 0.013 + 128 * 0.0002
    assert waits == pytest.approx(0.05 + step + 0.05, abs=0.005)


def test_jitter_holds_back_a_burst_and_a_busy_pipeline() -> None:
    steady = ring(Leg(delay_s=0.05, up_bytes_per_s=6 * MB))
    shaky = ring(Leg(delay_s=0.05, up_bytes_per_s=6 * MB, jitter_std_s=0.014))
    assert decode_cost(steady) == decode_cost(shaky)
    late_s = prefill_cost(shaky, 512, 16).expected_s - prefill_cost(steady, 512, 16).expected_s
    assert 0.02 < late_s < 0.2
    assert prefill_cost(shaky, 512, 16) == prefill_cost(shaky, 512, 16)
    assert held_back_s(shaky.legs[0], 0.0) == 0 < held_back_s(shaky.legs[0], 0.001) < held_back_s(shaky.legs[0], 1.0) < 0.014


def test_the_chosen_chunk_is_the_best_of_all() -> None:
    for leg in (Leg(), Leg(delay_s=0.005, up_bytes_per_s=12 * MB), Leg(delay_s=0.01, up_bytes_per_s=2.4 * MB)):
        made = ring(leg, credit_bytes=1024**2, credit_lump_bytes=1024**2 // 4, window_cost_bytes=256)
        best = choose_chunk(made, 512)
        assert all(prefill_cost(made, 512, best).expected_s <= prefill_cost(made, 512, chunk).expected_s for chunk in CHUNKS)
    assert choose_chunk(ring(Leg()), 512) > choose_chunk(ring(Leg(up_bytes_per_s=2.4 * MB)), 512)


legs = st.builds(
    Leg,
    delay_s=st.floats(0, 0.2),
    up_bytes_per_s=st.none() | st.floats(1e5, 1e9),
    down_bytes_per_s=st.none() | st.floats(1e5, 1e9),
)


@given(st.lists(legs, min_size=3, max_size=6), st.integers(1, 700), st.sampled_from(CHUNKS))
def test_no_expectation_lies_below_its_floor(made: list[Leg], prompt: int, chunk: int) -> None:
    some = Ring(stages=(CURVE,) * (len(made) - 1), legs=tuple(made), row_bytes=4176, credit_bytes=1024**2)
    costs: list[Cost] = [decode_cost(some), decode_cost(some, 16), prefill_cost(some, prompt, chunk)]
    assert all(0 < cost.floor_s <= cost.expected_s for cost in costs)


@given(legs, st.floats(1.1, 10))
def test_a_faster_link_never_costs_more(leg: Leg, factor: float) -> None:
    faster = replace(leg, up_bytes_per_s=None if leg.up_bytes_per_s is None else leg.up_bytes_per_s * factor)
    assert decode_cost(ring(faster)).floor_s <= decode_cost(ring(leg)).floor_s
    assert prefill_cost(ring(faster), 300, 64).expected_s <= prefill_cost(ring(leg), 300, 64).expected_s + 1e-9


def test_what_is_no_ring_is_refused() -> None:
    with pytest.raises(UsageError, match="4 stages, 4 legs"):
        Ring(stages=(CURVE,) * 4, legs=(Leg(),) * 4, row_bytes=8336)
    with pytest.raises(UsageError, match="0 tokens"):
        prefill_cost(ring(Leg()), 0, 128)

"""The targets of the fuzzers, without a fuzzer: seeds, inputs that once broke them, and mutations of both."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fuzz
from fuzz.seeds import SEEDS
from fuzz.targets import TARGETS

REGRESSIONS = Path(fuzz.__file__).parent / "regressions"
INPUTS = {name: make() + [path.read_bytes() for path in sorted((REGRESSIONS / name).iterdir())] for name, make in SEEDS.items()}


@st.composite
def mutations(draw: st.DrawFn, inputs: list[bytes]) -> bytes:
    """One input with a few pieces cut out, repeated, replaced, or spliced in from another."""
    data = bytearray(draw(st.sampled_from(inputs)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(1, max(1, len(data))))  # the first byte says which way in
        stop = start + draw(st.integers(0, 16))
        donor = draw(st.sampled_from(inputs))
        at = draw(st.integers(0, len(donor)))
        data[start:stop] = draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from([bytes(8), b"\xff" * 8, bytes(data[start:stop]) * 3, b"\x91" * 2000, b"[" * 2000]),
                st.just(donor[at : at + 64]),
            )
        )
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_honest_peers_send_and_what_once_broke_a_target_breaks_none(name: str) -> None:
    for data in INPUTS[name]:
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
def test_mutations_break_no_target(name: str, data: st.DataObject) -> None:
    TARGETS[name](data.draw(mutations(INPUTS[name])))


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
def test_nothing_that_is_sent_allocates_more_than_its_size_warrants(name: str, data: st.DataObject) -> None:
    sent = data.draw(mutations(INPUTS[name]))
    TARGETS[name](sent)  # what is made once, and kept
    tracemalloc.start()
    try:
        TARGETS[name](sent)
        assert tracemalloc.get_traced_memory()[1] < 100_000 + 100 * len(sent)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
@given(st.binary(max_size=400))
def test_random_bytes_break_no_target(name: str, data: bytes) -> None:
    TARGETS[name](data)

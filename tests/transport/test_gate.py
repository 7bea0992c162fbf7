"""Which connections a listener lets in, and how often a stranger may do a thing: no sockets, no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import LinkOverloaded
from farflung.transport.gate import Gate, GateConfig
from farflung.transport.rates import Rates, source_of

HERE, THERE = "192.0.2.1", "198.51.100.7"


def gate(**limits: int) -> Gate[str]:
    return Gate(GateConfig(**{"burst": 1000, **limits}))  # type: ignore[arg-type]


def test_a_source_that_holds_half_open_connections_loses_its_own_oldest() -> None:
    made = gate(greetings_per_source=2)
    assert made.enter("honest", THERE, 0.0) is None
    assert [made.enter(name, HERE, 0.0) for name in "abcd"] == [None, None, "a", "b"]
    assert made.greetings == 3


def test_where_all_are_too_many_the_source_with_most_pays() -> None:
    made = gate(greetings=4)
    made.enter("honest", THERE, 0.0)
    for name in "abc":
        made.enter(name, HERE, 0.0)
    assert made.enter("newcomer", "203.0.113.5", 0.0) == "a"
    assert made.greetings == 4


def test_who_has_finished_its_handshake_is_not_dropped_for_others() -> None:
    made = gate(greetings_per_source=1)
    made.enter("a", HERE, 0.0)
    made.greeted("a")
    assert made.enter("b", HERE, 0.0) is None
    assert (made.connections, made.greetings) == (2, 1)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"connections_per_source": 2}, "2 connections open"),
        ({"connections": 2}, "2 connections are open"),
        ({"burst": 2}, "more"),
    ],
)
def test_a_connection_too_many_is_turned_away_with_the_number(limits: dict[str, int], says: str) -> None:
    made = gate(**limits)
    for name in "ab":
        made.enter(name, HERE, 0.0)
        made.greeted(name)
    with pytest.raises(LinkOverloaded, match=says):
        made.enter("c", HERE, 0.0)
    made.left("c")  # its socket is closed, too
    assert made.connections == 2


def test_room_is_there_again_when_a_socket_is_closed() -> None:
    made = gate(connections_per_source=1)
    made.enter("a", HERE, 0.0)
    made.left("a")
    assert made.enter("b", HERE, 0.0) is None


Step = tuple[str, str]


@given(st.lists(st.tuples(st.sampled_from("egl"), st.integers(0, 11), st.sampled_from([HERE, THERE])), max_size=80))
def test_whatever_happens_the_counts_are_right_and_within_the_limits(steps: list[tuple[str, int, str]]) -> None:
    made = Gate[int](GateConfig(connections=6, connections_per_source=4, greetings=3, greetings_per_source=2, burst=1000))
    open_, greeting = set(), set()
    for what, connection, source in steps:
        if what == "e" and connection not in open_:
            try:
                dropped = made.enter(connection, source, 0.0)
            except LinkOverloaded:
                assert len(open_) >= 4
                continue
            open_.add(connection)
            greeting.add(connection)
            if dropped is not None:
                assert dropped in greeting
                greeting.remove(dropped)
        elif what == "g":
            made.greeted(connection)
            greeting.discard(connection)
        elif what == "l":
            made.left(connection)
            open_.discard(connection)
            greeting.discard(connection)
        assert (made.connections, made.greetings) == (len(open_), len(greeting))
        assert made.greetings <= 3
        assert made.connections <= 6


@given(st.lists(st.floats(0.0, 1.0), max_size=60))
def test_a_source_never_gets_more_than_its_burst_and_its_rate(pauses: list[float]) -> None:
    rates, now, taken = Rates(burst=5, per_s=2.0), 0.0, 0
    for pause in pauses:
        now += pause
        taken += rates.take(HERE, now)
        assert taken <= 5 + 2.0 * now + 1e-6


def test_sources_do_not_spend_each_others_rate_and_are_not_remembered_for_ever() -> None:
    rates = Rates(burst=1, per_s=1.0)
    assert rates.take(HERE, 0.0)
    assert not rates.take(HERE, 0.5)
    assert rates.take(THERE, 0.5)
    assert rates.take(HERE, 1.5)
    for number in range(10_000):
        rates.take(str(number), 2.0)
    assert len(rates._buckets) <= 4096


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("no address", "no address"),
    ],
)
def test_a_source_is_what_one_customer_is_given(host: str, source: str) -> None:
    assert source_of(host) == source

from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import LayersMissing, UsageError
from farflung.core.ids import NodeId
from farflung.core.model import LayerRange
from farflung.planning.curve import time_ms
from farflung.planning.routes import RouteOptions, StageOffer, choose_route


def node(name: str) -> NodeId:
    return NodeId(name.ljust(64, "0"))


def offer(
    name: str, layers: str, decode_ms: float = 10.0, *, free: int = 1000, trip: float | None = 0.02, kind: str = ""
) -> StageOffer:
    return StageOffer(
        node_id=node(name),
        layers=LayerRange.parse(layers),
        decode_ms=decode_ms,
        kv_free_tokens=free,
        round_trip_s=trip,
        engine_class=kind,
    )


def names(offers: list[StageOffer], options: RouteOptions | None = None, layers: int = 12) -> str:
    return " ".join(hop.node_id.rstrip("0") for hop in choose_route(offers, layers, options).hops)


def links(**round_trips: float) -> RouteOptions:
    return RouteOptions(links={(node(pair[0]), node(pair[1])): trip for pair, trip in round_trips.items()})


@pytest.mark.parametrize(
    ("offers", "options", "route"),
    [
        ([offer("a", "0:12")], None, "a"),
        ([offer("b", "6:12"), offer("a", "0:6")], None, "a b"),
        ([offer("a", "0:6"), offer("b", "6:12"), offer("c", "6:12", 5)], None, "a c"),
        ([offer("a", "0:6"), offer("b", "6:12", trip=0.2), offer("c", "6:12", 30)], None, "a c"),
        ([offer("a", "0:6"), offer("b", "6:12", trip=None), offer("c", "6:12")], None, "a c"),
        # one hop of 25 ms beats two of 10 ms with 50 ms of an unmeasured link between
        ([offer("a", "0:6"), offer("b", "6:12"), offer("w", "0:12", 25)], None, "w"),
        ([offer("a", "0:6"), offer("b", "6:12"), offer("w", "0:12", 25)], links(ab=0.001), "a b"),
        ([offer("a", "0:6"), offer("b", "6:12"), offer("w", "0:12", 25)], links(ba=0.001), "a b"),
        # a measured link that is bad loses to one nobody knows
        ([offer("a", "0:6"), offer("b", "6:12"), offer("c", "6:12", 11)], links(ab=0.5), "a c"),
        ([offer("a", "0:6"), offer("b", "6:12"), offer("c", "6:12")], None, "a b"),
        ([offer("a", "0:6", free=10), offer("b", "0:6", 90), offer("c", "6:12")], RouteOptions(lease_tokens=11), "b c"),
        ([offer("a", "0:6"), offer("b", "0:6", 90), offer("c", "6:12")], RouteOptions(avoid=frozenset({node("a")})), "b c"),
        # a class of its own beats the faster mixture, unless the caller allows it
        ([offer("a", "0:6", kind="x"), offer("b", "6:12", kind="y"), offer("w", "0:12", 900, kind="y")], None, "w"),
        (
            [offer("a", "0:6", kind="x"), offer("b", "6:12", kind="y"), offer("w", "0:12", 900, kind="y")],
            RouteOptions(mix_classes=True),
            "a b",
        ),
    ],
)
def test_the_cheapest_chain_of_joining_ranges_is_chosen(
    offers: list[StageOffer], options: RouteOptions | None, route: str
) -> None:
    assert names(offers, options) == route


def test_equal_costs_take_fewer_hops_then_the_lower_node_ids_in_any_order_of_the_offers() -> None:
    free = RouteOptions(unmeasured_round_trip_s=0.0)
    offers = [offer("a", "0:6", 5), offer("b", "6:12", 5), offer("w", "0:12", 10)]
    assert {names(list(order), free) for order in permutations(offers)} == {"w"}
    offers = [offer("d", "0:6"), offer("c", "0:6"), offer("f", "6:12"), offer("e", "6:12")]
    assert {names(list(order)) for order in permutations(offers)} == {"c e"}


@pytest.mark.parametrize(
    ("offers", "options", "message", "hint"),
    [
        ([], None, "layers 0:12 are missing: no node serves any layer", "farflung node --layers 0:12"),
        (
            [offer("a", "0:4"), offer("b", "8:12"), offer("c", "0:4")],
            RouteOptions(model="m/x"),
            "layers 4:8 of 12 are missing (ranges must join); served are 0:4 by a0000000 c0000000, 8:12 by b0000000",
            "farflung node --model m/x --layers 4:8",
        ),
        ([offer("a", "4:8")], None, "layers 0:4 and 8:12 of 12", "farflung node --layers 0:4; farflung node --layers 8:12"),
        ([offer("a", "0:7"), offer("b", "6:12")], None, "layers 7:12 of 12 are missing", "--layers 7:12"),
        (
            [offer("a", "0:6", free=5000), offer("b", "6:12", free=100)],
            RouteOptions(lease_tokens=4096),
            "layers 6:12 have no node with 4096 free KV tokens: b0000000 (6:12) has 100",
            "ask for fewer tokens",
        ),
        (
            [offer("a", "0:6", kind="x"), offer("b", "6:12", kind="y")],
            None,
            "no engine class serves all 12",
            "mixes engine classes",
        ),
    ],
)
def test_missing_layers_are_named_with_the_command_that_adds_them(
    offers: list[StageOffer], options: RouteOptions | None, message: str, hint: str
) -> None:
    with pytest.raises(LayersMissing) as caught:
        choose_route(offers, 12, options)
    assert message in caught.value.message
    assert hint in caught.value.hint


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[StageOffer], RouteOptions]:
    letters = "abcdefg"
    count = draw(st.integers(0, len(letters)))
    offers = []
    for name in letters[:count]:
        start = draw(st.integers(0, 3))
        stop = draw(st.integers(start + 1, 4))
        trip = draw(st.sampled_from([None, 0.0, 0.01, 0.2]))
        offers.append(offer(name, f"{start}:{stop}", draw(st.sampled_from([1.0, 2.0, 40.0])), trip=trip))
    pairs = st.tuples(st.sampled_from(letters).map(node), st.sampled_from(letters).map(node))
    return offers, RouteOptions(links=draw(st.dictionaries(pairs, st.sampled_from([0.001, 0.05, 0.4]), max_size=8)))


def cost(chain: tuple[StageOffer, ...], options: RouteOptions) -> float:
    def link(left: StageOffer, right: StageOffer) -> float:
        measured = options.links.get((left.node_id, right.node_id), options.links.get((right.node_id, left.node_id)))
        return (options.unmeasured_round_trip_s if measured is None else measured) * 500

    def home(end: StageOffer) -> float:
        return (options.unmeasured_round_trip_s if end.round_trip_s is None else end.round_trip_s) * 500

    between = sum(link(left, right) for left, right in pairwise(chain))
    return sum(o.decode_ms for o in chain) + between + home(chain[0]) + home(chain[-1])


@given(swarms())
def test_no_chain_of_any_nodes_is_cheaper_than_the_route(swarm: tuple[list[StageOffer], RouteOptions]) -> None:
    offers, options = swarm
    chains = [
        chain
        for size in range(1, 5)
        for chain in permutations(offers, size)
        if chain[0].layers.start == 0
        and chain[-1].layers.stop == 4
        and all(left.layers.stop == right.layers.start for left, right in pairwise(chain))
    ]
    if not chains:
        with pytest.raises(LayersMissing):
            choose_route(offers, 4, options)
        return
    best = min(chains, key=lambda c: (round(cost(c, options), 6), len(c), [o.node_id for o in c]))
    assert [hop.node_id for hop in choose_route(offers, 4, options).hops] == [o.node_id for o in best]


def test_a_node_that_offers_two_ranges_is_refused() -> None:
    with pytest.raises(UsageError, match="two ranges"):
        choose_route([offer("a", "0:6"), offer("a", "6:12")], 12)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 10.0), (2, 12.0), (4, 16.0), (8, 16.0 + 4.0), (16, 40.0)])
def test_a_t_curve_is_read_between_its_points_and_beyond_them(tokens: int, expected: float) -> None:
    assert time_ms([(1, 10.0), (4, 16.0), (8, 20.0)], tokens) == pytest.approx(expected)

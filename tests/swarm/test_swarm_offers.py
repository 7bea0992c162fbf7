import pytest
from swarm_samples import DIGEST, OTHER_DIGEST, a_record

from farflung.core.errors import NoSuchModel, UsageError
from farflung.core.model import LayerRange
from farflung.identity.keys import Identity
from farflung.planning.placement import choose_layers
from farflung.planning.routes import RouteOptions, choose_route
from farflung.swarm.links import MeasuredLink
from farflung.swarm.offers import find_model, link_round_trips_s, offers_of, ranges_of, served_models

A, B, C = sorted((Identity.generate() for _ in range(3)), key=lambda identity: identity.node_id)


def test_records_become_offers_with_the_time_of_the_t_curve_and_the_free_kv() -> None:
    records = [
        a_record(B, layers="6:12", t_curve_ms=()),
        a_record(A),
        a_record(C, status="draining"),
        a_record(Identity.generate(), digest=OTHER_DIGEST),
        a_record(Identity.generate(), model_layers=20),
    ]
    offers = offers_of(records, DIGEST, 18, tokens=8, round_trips_s={A.node_id: 0.03})
    assert [(o.node_id, str(o.layers), o.decode_ms, o.kv_free_tokens, o.round_trip_s) for o in offers] == [
        (A.node_id, "0:6", 24.0, 600, 0.03),
        (B.node_id, "6:12", 60.0, 600, None),
    ]


def test_served_models_tell_what_is_covered_and_whether_a_route_exists() -> None:
    records = [
        a_record(A),
        a_record(B, layers="0:18"),
        a_record(C, digest=OTHER_DIGEST, model="other", layers="6:12", model_layers=12),
    ]
    tiny, other = served_models(records)[::-1]
    assert (tiny.name, tiny.nodes, tiny.complete) == ("test/tiny", 2, True)
    assert [(str(layers), nodes) for layers, nodes in tiny.coverage] == [("0:6", 2), ("6:18", 1)]
    assert (other.name, other.layers, other.complete) == ("other", 12, False)


def test_a_model_is_found_by_name_or_digest_and_an_ambiguous_name_is_refused() -> None:
    records = [a_record(A), a_record(B, digest=OTHER_DIGEST, model="other")]
    assert find_model(records, "test/tiny").digest == find_model(records, DIGEST).digest == DIGEST
    with pytest.raises(NoSuchModel, match=r"nobody serves test/none; served is other \(cdcdcdcd\), test/tiny \(abababab\)"):
        find_model(records, "test/none")
    with pytest.raises(NoSuchModel, match="served is nothing"):
        find_model([], "x")
    with pytest.raises(UsageError, match="2 different models are called test/tiny") as caught:
        find_model([a_record(A), a_record(B, digest=OTHER_DIGEST)], "test/tiny")
    assert "digest" in caught.value.hint


def test_measured_links_reach_the_choice_of_a_route() -> None:
    records = [a_record(A), a_record(B, layers="6:18"), a_record(C, layers="6:18")]
    links = link_round_trips_s([MeasuredLink(A.node_id, C.node_id, 0.001, 0.0)])
    route = choose_route(offers_of(records, DIGEST, 18), 18, RouteOptions(links=links))
    assert [hop.node_id for hop in route.hops] == [A.node_id, C.node_id]


def test_a_record_that_claims_another_depth_and_one_that_drains_count_for_nobody() -> None:
    records = [
        a_record(A),
        a_record(B, model_layers=10_000, layers="5000:6000"),
        a_record(C, layers="6:18", status="draining"),
        a_record(Identity.generate(), digest=OTHER_DIGEST, layers="6:18"),
    ]
    assert ranges_of(records, DIGEST, 18) == [LayerRange(0, 6)]
    assert [offer.layers for offer in offers_of(records, DIGEST, 18)] == [LayerRange(0, 6)]
    assert choose_layers(ranges_of(records, DIGEST, 18), 18, 18) == LayerRange(6, 18)

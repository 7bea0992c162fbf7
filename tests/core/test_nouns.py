"""Layer ranges, routes, windows, units, errors: what they refuse and what they say."""

import pytest

from farflung.core import errors
from farflung.core.errors import FarflungError, ProtocolViolation, StageFailed, UsageError, error_from_code, first_cause
from farflung.core.ids import NodeId, parse_node_id, parse_session_id
from farflung.core.model import LayerRange
from farflung.core.route import Hop, Route
from farflung.core.sampling import SamplingOptions
from farflung.core.units import Bytes
from farflung.core.window import Commit, SlotRun, SlotSpan, spans_of

A, B, C, D, E, F = (NodeId(digit * 64) for digit in "abcdef")


@pytest.mark.parametrize("text", ["", "5", "5:5", "6:5", "-1:4", "a:b", "1:2:3", "1:99999999"])
def test_a_layer_range_that_is_none_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        LayerRange.parse(text)
    assert caught.value.hint


def test_a_layer_range_counts_and_contains_its_layers() -> None:
    layers = LayerRange.parse(" 2:5 ")
    assert len(layers) == 3
    assert [layer in layers for layer in (1, 2, 4, 5)] == [False, True, True, False]
    assert str(layers) == "2:5"


@pytest.mark.parametrize(
    "hops",
    [
        (),
        (Hop(A, LayerRange(1, 2)),),
        (Hop(A, LayerRange(0, 2)), Hop(B, LayerRange(3, 4))),
        (Hop(A, LayerRange(0, 2)), Hop(A, LayerRange(2, 4))),
    ],
    ids=["empty", "late start", "gap", "node twice"],
)
def test_a_route_with_a_gap_or_a_repeated_node_is_refused(hops: tuple[Hop, ...]) -> None:
    with pytest.raises(UsageError):
        Route(hops)


def test_a_route_knows_places_and_neighbours() -> None:
    route = Route((Hop(A, LayerRange(0, 2)), Hop(B, LayerRange(2, 6))))
    assert (route.layers, route.index_of(B), route.tail.node_id) == (6, 1, B)
    assert (route.predecessor(0), route.successor(0)) == (None, route.hops[1])
    assert (route.predecessor(1), route.successor(1)) == (route.hops[0], None)
    assert route.hop_of(A) == route.hops[0]
    assert (route.index_of(C), route.hop_of(C)) == (None, None)


def test_a_repair_renews_the_edges_into_the_new_stage_and_out_of_it_only() -> None:
    hops = [Hop(node, LayerRange(at, at + 1)) for at, node in enumerate((A, B, C, D))]
    route = Route(tuple(hops))
    assert (route.epoch, [route.edge_epoch(index) for index in range(4)]) == (1, [1, 1, 1, 1])
    repaired = Route((hops[0], Hop(E, LayerRange(1, 2), epoch=2), *hops[2:]))
    assert (repaired.epoch, [repaired.edge_epoch(index) for index in range(4)]) == (2, [1, 2, 2, 1])
    first = Route((Hop(F, LayerRange(0, 1), epoch=3), *repaired.hops[1:]))
    assert (first.epoch, [first.edge_epoch(index) for index in range(4)]) == (3, [3, 3, 2, 1])


def test_epochs_begin_at_one() -> None:
    with pytest.raises(UsageError, match="epochs begin at 1"):
        Route((Hop(A, LayerRange(0, 2), epoch=0),))


@pytest.mark.parametrize("run", [(0, 0, -1), (5, 1, 5), (5, 1, -2), (2**31 - 1, 1, 0), (1, 2**31, 0)])
def test_slot_runs_out_of_range_are_refused(run: tuple[int, int, int]) -> None:
    with pytest.raises(ProtocolViolation):
        SlotRun(*run)


def test_a_run_is_a_path_under_its_parent() -> None:
    assert list(SlotRun(7, 3, 2).pairs()) == [(7, 2), (8, 7), (9, 8)]


def test_a_commit_before_the_first_position_is_refused() -> None:
    with pytest.raises(ProtocolViolation):
        Commit(-9, spans_of([1]))


def test_spans_name_slots_with_the_fewest_pieces() -> None:
    assert spans_of([4, 5, 6, 9, 8]) == (SlotSpan(4, 3), SlotSpan(9, 1), SlotSpan(8, 1))
    commit = Commit(10, spans_of([4, 5, 9]))
    assert (commit.count, commit.stop, list(commit.slots())) == (3, 13, [4, 5, 9])


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 1024**2, "5.0 MiB"), (3 * 1024**4, "3.0 TiB")],
)
def test_bytes_print_themselves_for_people(size: int, text: str) -> None:
    assert str(Bytes(size)) == text


@pytest.mark.parametrize(
    "options",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}, {"seed": 2**64}],
)
def test_sampling_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        SamplingOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "xyz", "A" * 64, "a" * 63])
def test_ids_must_be_lower_case_hex_of_the_right_length(text: str) -> None:
    with pytest.raises(UsageError):
        parse_node_id(text)
    with pytest.raises(UsageError):
        parse_session_id(text)


def test_every_error_travels_by_its_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FarflungError)]
    assert len({kind.code for kind in kinds}) == len(kinds)
    for kind in kinds:
        found = error_from_code(kind.code, "what", "do this")
        assert type(found) is kind
        assert (found.message, found.hint) == ("what", "do this")


def test_an_error_code_of_a_newer_peer_becomes_a_stage_failure() -> None:
    assert type(error_from_code("never_heard_of", "what")) is StageFailed


def test_every_error_is_drawn_in_the_tree_at_the_top_of_the_module() -> None:
    drawn = errors.__doc__ or ""
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, FarflungError):
            assert kind.__name__ in drawn


def test_the_first_cause_of_a_task_group_is_ours_or_none() -> None:
    ours = UsageError("x")
    assert first_cause(BaseExceptionGroup("g", [ExceptionGroup("h", [ours]), StageFailed("y")])) is ours
    assert first_cause(BaseExceptionGroup("g", [ours, KeyError("z")])) is None


def test_what_a_peer_says_in_an_error_cannot_steer_a_terminal() -> None:
    error = error_from_code("stage_lost", "one\ntwo \x1b[31mred\x07 größe\u202e" + "x" * 5000, "do\rthis")
    assert error.message.startswith("one two  [31mred  größe x")
    assert len(error.message) == 2000
    assert error.hint == "do this"

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import UsageError
from farflung.core.model import LayerRange
from farflung.planning.coverage import coverage, missing_layers
from farflung.planning.placement import choose_layers, is_still_needed


def ranges(text: str) -> list[LayerRange]:
    return [LayerRange.parse(part) for part in text.split()]


def written(parts: tuple[LayerRange, ...]) -> str:
    return " ".join(map(str, parts))


def range_lists(layers: int) -> st.SearchStrategy[list[LayerRange]]:
    pairs = list(combinations(range(layers + 1), 2))
    return st.lists(st.sampled_from(pairs).map(lambda pair: LayerRange(*pair)), max_size=8)


def joins(served: list[LayerRange], layers: int) -> bool:
    reached = {0}
    for start in range(layers):
        if start in reached:
            reached |= {r.stop for r in served if r.start == start}
    return layers in reached


@pytest.mark.parametrize(
    ("served", "expected"),
    [
        ("", [("0:18", 0)]),
        ("0:18", [("0:18", 1)]),
        ("0:6 6:12 12:18", [("0:18", 1)]),
        ("0:6 0:12", [("0:6", 2), ("6:12", 1), ("12:18", 0)]),
        ("3:4", [("0:3", 0), ("3:4", 1), ("4:18", 0)]),
    ],
)
def test_coverage_lists_runs_of_layers_with_the_number_of_their_nodes(served: str, expected: list[tuple[str, int]]) -> None:
    assert [(str(layers), nodes) for layers, nodes in coverage(ranges(served), 18)] == expected


@pytest.mark.parametrize(
    ("served", "missing"),
    [
        ("", "0:18"),
        ("0:18", ""),
        ("0:6 12:18", "6:12"),
        ("6:12", "0:6 12:18"),
        ("0:7 6:12 12:18", "7:12"),  # every layer is covered, but nothing starts where 0:7 ends; 0:6 would be one layer more
        ("0:7 6:18", "0:6"),
    ],
)
def test_missing_layers_are_the_fewest_that_make_ranges_join(served: str, missing: str) -> None:
    assert written(missing_layers(ranges(served), 18)) == missing


@given(range_lists(9))
def test_ranges_join_exactly_when_nothing_is_missing_and_join_after_adding_what_is(served: list[LayerRange]) -> None:
    missing = missing_layers(served, 9)
    assert (missing == ()) == joins(served, 9)
    assert joins([*served, *missing], 9)
    assert all(left.stop < right.start for left, right in pairwise(missing))


@pytest.mark.parametrize(
    ("existing", "count", "chosen"),
    [
        ("", 6, "0:6"),
        ("", 40, "0:18"),
        ("0:6", 6, "6:12"),
        ("0:6 6:12", 6, "12:18"),
        ("0:6 12:18", 8, "6:12"),  # no more than the gap: 6:14 would join nothing
        ("0:6 12:18", 4, "6:10"),
        ("0:6 6:12 12:18", 6, "0:6"),
        ("0:6 0:6 6:12 12:18 12:18", 6, "6:12"),
        ("0:6 0:6 6:12 12:18", 12, "6:18"),
        ("0:9 9:18", 4, "0:4"),
    ],
)
def test_a_new_node_fills_the_first_gap_and_then_the_least_covered_ranges(existing: str, count: int, chosen: str) -> None:
    assert str(choose_layers(ranges(existing), 18, count)) == chosen


@given(range_lists(9), st.integers(1, 9))
def test_nodes_that_choose_one_after_another_make_a_route(existing: list[LayerRange], count: int) -> None:
    for _ in range(9):
        chosen = choose_layers(existing, 9, count)
        assert 1 <= len(chosen) <= count
        existing = [*existing, chosen]
    assert joins(existing, 9)


@given(st.integers(1, 6), st.integers(1, 9))
def test_nodes_that_start_together_spread_where_each_looks_again_before_it_serves(count: int, nodes: int) -> None:
    existing: list[LayerRange] = []
    loaded = [choose_layers(existing, 9, count)] * nodes  # all see the same empty swarm
    while loaded:
        ready = loaded.pop()
        if is_still_needed(ready, existing, 9):
            existing.append(ready)
        else:
            loaded.insert(0, choose_layers(existing, 9, count))
    assert joins(existing, 9) or len(set(existing)) == nodes


def test_a_range_beyond_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match="end beyond the 6 layers"):
        coverage(ranges("0:7"), 6)
    with pytest.raises(UsageError, match="cannot serve 0 layers"):
        choose_layers([], 6, 0)

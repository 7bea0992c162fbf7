"""The KV pool's bookkeeping against an oracle that recomputes everything from the list of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.core.errors import LeaseExceeded, ProtocolViolation, SessionRefused
from farflung.core.window import NO_SLOT, Commit, SlotRun, spans_of
from farflung.engine.kv_pool import Extents, NewRows, SessionCells

LEASE = 24


class Oracle:
    """Every live token's parent and cell, and nothing else."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        self.cell: dict[int, int] = {}
        self.root = NO_SLOT
        self.committed: list[int] = []

    def path(self, slot: int) -> list[int]:
        """From position 0 to ``slot``."""
        found: list[int] = []
        while slot != NO_SLOT:
            found.append(slot)
            slot = self.parent[slot]
        return found[::-1]

    def alive(self) -> list[int]:
        return [slot for slot in self.parent if self.root == NO_SLOT or self.root in self.path(slot)[:-1]]

    def commit(self, slots: list[int]) -> None:
        self.committed += slots
        self.root = self.committed[-1]
        live = set(self.committed) | set(self.alive())
        self.parent = {slot: parent for slot, parent in self.parent.items() if slot in live}
        self.cell = {slot: cell for slot, cell in self.cell.items() if slot in live}


def check_rows(cells: SessionCells, oracle: Oracle, rows: NewRows, window: int) -> None:
    seen = cells.visible(rows)
    near = cells.visible(rows, window)
    for index, slot in enumerate(rows.slots):
        path = oracle.path(slot)
        assert rows.positions[index] == len(path) - 1
        assert set(seen[index].nonzero()[0].tolist()) == {oracle.cell[above] for above in path}
        assert set(near[index].nonzero()[0].tolist()) == {oracle.cell[above] for above in path[-window:]}
    keys = cells.slice_keys(rows)
    if keys is not None:
        for index, slot in enumerate(rows.slots):
            assert {oracle.cell[above] for above in oracle.path(slot)} == set(range(keys - len(rows.slots) + index + 1))
        path = oracle.path(rows.slots[-1])
        for start in range(keys):
            assert cells.in_order(start, keys) == all(oracle.cell[path[i]] == i for i in range(start, keys))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_cells_visible_to_a_token_are_those_of_its_ancestors(data: st.DataObject) -> None:
    cells, oracle = SessionCells(LEASE), Oracle()
    next_slot = 0
    for _ in range(data.draw(st.integers(1, 14), label="windows")):
        runs: list[SlotRun] = []
        parents = [oracle.root, *oracle.alive()]
        room = cells.free_cells
        for _ in range(data.draw(st.integers(0, 3), label="runs")):
            count = data.draw(st.integers(1, 5), label="count")
            if count > room:
                continue
            room -= count
            run = SlotRun(next_slot, count, data.draw(st.sampled_from(parents), label="parent"))
            runs.append(run)
            for slot, parent in run.pairs():
                oracle.parent[slot] = parent
                parents.append(slot)
            next_slot += count + data.draw(st.integers(0, 1), label="gap")
        new = [slot for run in runs for slot, _ in run.pairs()]
        commit = None
        # The root may be any slot below which all that is new hangs, itself included.
        candidates = [
            slot for slot in oracle.alive() if all(slot in oracle.path(row) or row in oracle.path(slot) for row in new)
        ]
        if candidates and data.draw(st.booleans(), label="commits"):
            path = oracle.path(data.draw(st.sampled_from(candidates), label="root"))
            overlap = data.draw(st.integers(0, min(2, len(oracle.committed))), label="overlap")
            start = len(oracle.committed) - overlap
            commit = Commit(start, spans_of(path[start:]))
            rows = cells.apply(runs, commit)
            oracle.cell.update(zip(rows.slots, rows.cells.tolist(), strict=True))
            oracle.commit(path[len(oracle.committed) :])
        else:
            rows = cells.apply(runs, None)
            oracle.cell.update(zip(rows.slots, rows.cells.tolist(), strict=True))

        live = [oracle.cell[slot] for slot in [*oracle.committed, *oracle.alive()]]
        assert len(set(live)) == len(live) == LEASE - cells.free_cells
        assert all(0 <= cell < cells.high for cell in live)
        assert cells.committed_cells.tolist() == [oracle.cell[slot] for slot in oracle.committed]
        assert dict(cells.alive_cells) == {slot: oracle.cell[slot] for slot in oracle.alive()}
        if rows.slots:
            check_rows(cells, oracle, rows, data.draw(st.integers(1, 6), label="window"))


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), max_size=12), st.randoms(use_true_random=False))
def test_extents_never_overlap_and_join_again_when_released(sizes: list[int], random: object) -> None:
    pool = Extents(32)
    held: list[tuple[int, int]] = []
    for size in sizes:
        if size > pool.largest_free:
            with pytest.raises(SessionRefused):
                pool.reserve(size)
            start, count = held.pop(random.randrange(len(held)))  # type: ignore[attr-defined]
            pool.release(start, count)
        else:
            held.append((pool.reserve(size), size))
        taken = [cell for start, count in held for cell in range(start, start + count)]
        assert len(set(taken)) == len(taken) == 32 - pool.free_tokens
        assert all(0 <= cell < 32 for cell in taken)
    for start, count in held:
        pool.release(start, count)
    assert pool.largest_free == pool.free_tokens == 32


def test_a_lease_that_does_not_fit_is_refused_with_what_is_free() -> None:
    pool = Extents(100)
    first, _, _ = pool.reserve(30), pool.reserve(40), pool.reserve(20)
    pool.release(first, 30)
    with pytest.raises(SessionRefused, match=r"35 tokens does not fit: 40 of 100 are free, 30 of them in one piece"):
        pool.reserve(35)


def test_a_short_lease_goes_where_it_leaves_long_ones_their_place() -> None:
    pool = Extents(100)
    long, _, short, _ = pool.reserve(50), pool.reserve(5), pool.reserve(20), pool.reserve(25)
    pool.release(long, 50)
    pool.release(short, 20)
    assert pool.reserve(15) == short
    assert pool.largest_free == 50


def test_plain_decode_reads_one_slice_in_order() -> None:
    cells = SessionCells(40)
    prompt = cells.apply([SlotRun(0, 10, NO_SLOT)], Commit(0, spans_of(range(10))))
    assert cells.slice_keys(prompt) == 10
    for slot in range(10, 40):
        rows = cells.apply([SlotRun(slot, 1, slot - 1)], Commit(slot - 1, spans_of([slot - 1])))
        assert cells.slice_keys(rows) == slot + 1
        assert cells.in_order(0, slot + 1)


def test_holes_of_dead_branches_close_so_that_decode_reads_a_slice_again() -> None:
    cells = SessionCells(40)
    cells.apply([SlotRun(0, 8, NO_SLOT)], Commit(0, spans_of(range(8))))
    branches = cells.apply([SlotRun(8, 3, 7), SlotRun(11, 3, 7)], None)
    assert cells.slice_keys(branches) is None
    rows = cells.apply([SlotRun(14, 1, 13)], Commit(8, spans_of([11, 12, 13])))  # the second branch wins: cells 11, 12, 13
    assert cells.slice_keys(rows) is None
    for slot in (15, 16):
        rows = cells.apply([SlotRun(slot, 1, slot - 1)], None)
    assert cells.slice_keys(rows) == cells.tree.tokens == 14
    assert not cells.in_order(0, 14)


def test_a_window_that_breaks_a_rule_changes_nothing() -> None:
    cells = SessionCells(8)
    cells.apply([SlotRun(0, 4, NO_SLOT)], Commit(0, spans_of(range(4))))
    before = cells.tree
    with pytest.raises(LeaseExceeded, match="4 committed and 5 pending tokens exceed the KV lease of 8"):
        cells.apply([SlotRun(4, 5, 3)], None)
    with pytest.raises(ProtocolViolation, match="used before"):
        cells.apply([SlotRun(2, 1, 1)], None)
    with pytest.raises(ProtocolViolation, match=r"slots \[5\] are dead"):
        cells.apply([SlotRun(4, 1, 3), SlotRun(5, 1, 3)], Commit(4, spans_of([4])))
    assert cells.tree is before
    assert cells.free_cells == 4

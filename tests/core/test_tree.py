"""The token tree against an oracle that recomputes everything from a parent table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import ProtocolViolation
from farflung.core.tree import TokenTree
from farflung.core.window import NO_SLOT, Commit, SlotRun, SlotSpan, spans_of


class Oracle:
    """Parents of every slot ever announced and the committed path; all else follows."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        self.path: list[int] = []

    def is_alive(self, slot: int) -> bool:
        root = self.path[-1] if self.path else NO_SLOT
        seen = slot
        while seen != NO_SLOT and seen != root:
            seen = self.parent[seen]
        return seen == root and slot != root and slot not in self.path

    def position(self, slot: int) -> int:
        depth = 0
        while self.parent[slot] != NO_SLOT:
            slot = self.parent[slot]
            depth += 1
        return depth


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    return draw(
        st.lists(st.tuples(st.sampled_from(["add", "add", "commit"]), st.integers(0, 10**6), st.integers(1, 5)), max_size=40)
    )


@given(histories())
def test_alive_slots_and_positions_are_what_the_parents_say(history: list[tuple[str, int, int]]) -> None:
    tree, oracle = TokenTree(), Oracle()
    for action, choice, count in history:
        if action == "add":
            parents = [NO_SLOT, *oracle.parent]
            run = SlotRun(tree.next_slot + choice % 3, count, parents[choice % len(parents)])
            before = tree.next_slot
            if run.parent >= before:
                continue
            tree, dead = tree.add([run])
            for slot, parent in run.pairs():
                oracle.parent[slot] = parent
            assert dead == {slot for slot, _ in run.pairs() if not oracle.is_alive(slot)}
        else:
            path = _some_path(tree, choice, count)
            if not path:
                continue
            start = tree.committed_tokens
            before_alive = set(tree.alive)
            tree, died = tree.commit(Commit(start, spans_of(path)))
            oracle.path.extend(path)
            assert died == {slot for slot in before_alive if not oracle.is_alive(slot) and slot not in oracle.path}
        assert set(tree.alive) == {slot for slot in oracle.parent if oracle.is_alive(slot)}
        for slot in tree.alive:
            assert tree.position_of(slot) == oracle.position(slot)
        assert [slot for span in tree.committed for slot in span] == oracle.path
        assert tree.tokens == len(oracle.path) + len(tree.alive)
        assert tree.root == (oracle.path[-1] if oracle.path else NO_SLOT)


def _some_path(tree: TokenTree, choice: int, count: int) -> list[int]:
    path: list[int] = []
    root = tree.root
    for _ in range(count):
        children = [slot for slot, place in tree.alive.items() if place.parent == root]
        if not children:
            break
        root = children[choice % len(children)]
        path.append(root)
    return path


def _tree() -> TokenTree:
    """Committed 0, 1; alive 2 and 3 under 1, 4 under 3."""
    tree, _ = TokenTree().add([SlotRun(0, 2, NO_SLOT)])
    tree, _ = tree.commit(Commit(0, (SlotSpan(0, 2),)))
    tree, _ = tree.add([SlotRun(2, 1, 1), SlotRun(3, 2, 1)])
    return tree


def test_committing_one_branch_kills_its_siblings() -> None:
    tree, died = _tree().commit(Commit(2, (SlotSpan(3, 1),)))
    assert died == {2}
    assert list(tree.alive) == [4]
    assert tree.position_of(4) == 3
    assert tree.position_of(3) == 2
    assert tree.position_of(2) is None


def test_a_slot_under_a_dead_one_is_dead_on_arrival() -> None:
    tree, _ = _tree().commit(Commit(2, (SlotSpan(3, 1),)))
    tree, dead = tree.add([SlotRun(5, 2, 2), SlotRun(7, 1, 4)])
    assert dead == {5, 6}
    assert set(tree.alive) == {4, 7}


def test_a_commit_may_repeat_what_is_committed_if_it_agrees() -> None:
    tree, died = _tree().commit(Commit(1, (SlotSpan(1, 1), SlotSpan(3, 2))))
    assert died == {2}
    assert tree.committed_tokens == 4
    same, died = tree.commit(Commit(0, (SlotSpan(0, 2),)))
    assert same == tree
    assert not died


@pytest.mark.parametrize(
    "commit",
    [
        Commit(3, (SlotSpan(2, 1),)),
        Commit(2, (SlotSpan(4, 1),)),
        Commit(2, (SlotSpan(99, 1),)),
        Commit(1, (SlotSpan(0, 1), SlotSpan(2, 1))),
        Commit(2, (SlotSpan(2, 1), SlotSpan(4, 1))),
    ],
    ids=["gap", "not under the root", "unknown", "contradiction", "no path"],
)
def test_a_commit_that_is_no_descendant_of_the_root_is_a_violation(commit: Commit) -> None:
    with pytest.raises(ProtocolViolation):
        _tree().commit(commit)


@pytest.mark.parametrize("run", [SlotRun(4, 1, 1), SlotRun(0, 1, NO_SLOT), SlotRun(9, 1, 7)], ids=["reused", "old", "orphan"])
def test_a_reused_slot_or_an_unknown_parent_is_a_violation(run: SlotRun) -> None:
    with pytest.raises(ProtocolViolation):
        _tree().add([run])


def test_a_tree_holds_what_is_committed_or_alive_and_knows_the_dead() -> None:
    tree, _ = _tree().commit(Commit(2, (SlotSpan(3, 1),)))
    assert [tree.holds(slot) for slot in range(6)] == [True, True, False, True, True, False]
    tree, _ = tree.add([SlotRun(5, 1, 2)])
    assert [tree.holds(5), tree.knows(5), tree.knows(6)] == [False, True, False]
    assert tree.knows(2), "below the root nothing new can be alive"


def test_a_commit_between_two_lengths_is_found_again() -> None:
    tree, _ = _tree().commit(Commit(2, (SlotSpan(3, 2),)))
    assert tree.commit_from(1) == Commit(1, (SlotSpan(1, 1), SlotSpan(3, 2)))
    assert tree.commit_from(1, 3) == Commit(1, (SlotSpan(1, 1), SlotSpan(3, 1)))
    assert tree.commit_from(4) is None
    assert tree.commit_from(6, 2) is None


@given(histories(), st.integers(0, 60), st.integers(0, 60))
def test_stretches_of_the_committed_path_are_those_of_the_whole_path(
    history: list[tuple[str, int, int]], start: int, stop: int
) -> None:
    tree = TokenTree()
    for action, choice, count in history:
        if action == "add":
            parents = [tree.root, *tree.alive]
            tree, _ = tree.add([SlotRun(tree.next_slot + choice % 3, count, parents[choice % len(parents)])])
        elif path := _some_path(tree, choice, count):
            tree, _ = tree.commit(Commit(tree.committed_tokens, spans_of(path)))
    whole = [slot for span in tree.committed for slot in span]
    assert [slot for span in tree.committed_between(start, stop) for slot in span] == whole[start:stop]
    assert all(tree.holds(slot) == (slot in whole or slot in tree.alive) for slot in range(tree.next_slot + 2))

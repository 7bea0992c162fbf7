"""Windows as values: rows taken out, cut in two, and made anew from a tree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.messages import Have, Window
from farflung.core.tree import TokenTree
from farflung.core.window import Commit, SlotRun, SlotSpan, spans_of
from farflung.protocol.limits import MAX_WINDOW_ROWS
from farflung.protocol.windows import (
    REPLAY_ROWS,
    Given,
    cut,
    is_committed_path,
    keep_rows,
    missing,
    pairs_of,
    runs_of,
)

NOBODY = frozenset[int]()


def chain(tokens: int, committed: int) -> TokenTree:
    """A path of which so many are committed."""
    tree, _ = TokenTree().add([SlotRun(0, tokens, -1)])
    return tree.commit(Commit(0, (SlotSpan(0, committed),)))[0] if committed else tree


def given_all(tree: TokenTree, wanted: frozenset[int] = NOBODY) -> Given:
    return Given(tree, tree, wanted)


def apply(tree: TokenTree, windows: list[Window]) -> TokenTree:
    for window in windows:
        tree, _ = tree.add(window.runs)
        if window.commit is not None:
            tree, _ = tree.commit(window.commit)
    return tree


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=20))
def test_runs_name_the_same_slots_and_parents_in_the_same_order(steps: list[tuple[int, int]]) -> None:
    pairs, slot = list[tuple[int, int]](), -1
    for back, skipped in steps:
        parent = max(-1, slot - back)
        slot += 1 + skipped
        pairs.append((slot, parent))
    assert list(pairs_of(Window(1, runs_of(pairs)))) == pairs


def test_a_path_is_one_run() -> None:
    assert runs_of([(4, 2), (5, 4), (6, 5), (7, 5)]) == (SlotRun(4, 3, 2), SlotRun(7, 1, 5))


def test_rows_are_taken_out_with_their_wants_and_the_rest_stays() -> None:
    window = Window(3, (SlotRun(0, 3, -1), SlotRun(7, 1, 1)), (SlotSpan(1, 2), SlotSpan(7, 1)), None, 8)
    kept, places = keep_rows(window, lambda slot: slot not in (2, 7))
    assert (kept, places) == (Window(3, (SlotRun(0, 2, -1),), (SlotSpan(1, 1),), None, 8), [0, 1])
    assert keep_rows(window, lambda slot: True) == (window, None)
    assert keep_rows(window, lambda slot: False) == (Window(3, (), (), None, 8), [])


@pytest.mark.parametrize(
    ("window", "answer"),
    [
        (Window(1, (SlotRun(0, 4, -1),), (), Commit(0, (SlotSpan(0, 4),))), True),
        (Window(1, (SlotRun(0, 1, -1),), (), Commit(0, (SlotSpan(0, 1),))), False),
        (Window(1, (SlotRun(0, 4, -1),), (), Commit(0, (SlotSpan(0, 3),))), False),
        (Window(1, (SlotRun(2, 2, 1),), (), Commit(0, (SlotSpan(0, 4),))), False),
        (Window(1, (SlotRun(0, 4, -1),)), False),
        (Window(1, ()), False),
    ],
    ids=["chunk", "one row", "part", "overlap", "no commit", "header"],
)
def test_only_a_prompt_chunk_may_be_cut(window: Window, answer: bool) -> None:
    assert is_committed_path(window) is answer


def test_both_parts_of_a_chunk_commit_their_own_rows() -> None:
    window = Window(1, (SlotRun(4, 5, 3),), (SlotSpan(8, 1),), Commit(4, (SlotSpan(4, 5),)), 9)
    first, rest = cut(window, 2)
    assert first == Window(1, (SlotRun(4, 2, 3),), (), Commit(4, (SlotSpan(4, 2),)), 6)
    assert rest == Window(1, (SlotRun(6, 3, 5),), (SlotSpan(8, 1),), Commit(6, (SlotSpan(6, 3),)), 9)


def test_a_receiver_that_holds_nothing_gets_the_prefix_in_chunks_and_then_what_is_alive() -> None:
    tree = chain(REPLAY_ROWS * 2 + 10, REPLAY_ROWS * 2 + 6)
    windows = missing(given_all(tree), Have(7, 0, (), 0))
    assert [window.rows for window in windows] == [REPLAY_ROWS, REPLAY_ROWS, 6, 4, 0]
    assert all(is_committed_path(window) for window in windows[:3])
    assert {window.epoch for window in windows} == {7}
    assert apply(TokenTree(), windows) == tree


def test_what_is_alive_goes_in_windows_of_bounded_size_parents_first() -> None:
    tree = chain(MAX_WINDOW_ROWS + 5, 0)
    assert [window.rows for window in missing(given_all(tree), Have(1, 0, (), 0))] == [MAX_WINDOW_ROWS, 5, 0]


def test_held_rows_are_not_sent_but_their_commits_are() -> None:
    tree = chain(8, 6)
    windows = missing(given_all(tree), Have(1, 2, (SlotSpan(2, 2), SlotSpan(6, 1)), 0))
    assert windows[0].runs == (SlotRun(4, 2, 3),)
    assert windows[0].commit == Commit(2, (SlotSpan(2, 4),))
    assert windows[1].runs == (SlotRun(7, 1, 6),)


def test_what_died_meanwhile_is_not_sent() -> None:
    tree, _ = chain(2, 2).add([SlotRun(2, 1, 1), SlotRun(3, 1, 1)])
    latest, _ = tree.commit(Commit(2, (SlotSpan(3, 1),)))
    windows = missing(Given(tree, latest, NOBODY), Have(1, 2, (), 0))
    assert [window.runs for window in windows] == [(SlotRun(3, 1, 1),), ()]


def test_answers_that_are_wanted_are_asked_for_again_and_last_comes_what_is_acknowledged() -> None:
    tree = chain(3, 2)
    (wanted,) = missing(given_all(tree, frozenset({2})), Have(1, 2, (), 0))
    assert (wanted.want, wanted.next_slot) == ((SlotSpan(2, 1),), 3)
    assert [window.next_slot for window in missing(given_all(tree), Have(1, 2, (), 0))] == [0, 3]
    assert missing(given_all(tree), Have(1, 2, (SlotSpan(2, 1),), 0)) == [Window(1, (), (), None, 3)]


def test_a_sender_behind_its_receiver_has_nothing_for_it_yet() -> None:
    assert missing(given_all(chain(3, 3)), Have(1, 9, (SlotSpan(12, 1),), 0)) == [Window(1, (), (), None, 3)]


@given(st.data())
def test_whatever_is_held_the_receiver_comes_to_have_what_the_sender_has(data: st.DataObject) -> None:
    """The receiver saw an earlier state of the sender's tree, less some rows with all that hangs under them."""
    tree, history = TokenTree(), [TokenTree()]
    for _ in range(data.draw(st.integers(0, 12))):
        parents = [tree.root, *tree.alive]
        run = SlotRun(tree.next_slot, data.draw(st.integers(1, 3)), data.draw(st.sampled_from(parents)))
        tree, _ = tree.add([run])
        children = [slot for slot, place in tree.alive.items() if place.parent == tree.root]
        if data.draw(st.booleans()):
            tree, _ = tree.commit(Commit(tree.committed_tokens, spans_of([data.draw(st.sampled_from(children))])))
        history.append(tree)
    before = data.draw(st.sampled_from(history))
    receiver, lost = TokenTree(), set[int]()
    for window in missing(given_all(before), Have(1, 0, (), 0)):
        pairs = []
        for slot, parent in pairs_of(window):
            if window.commit is None and (parent in lost or data.draw(st.booleans())):
                lost.add(slot)
            else:
                pairs.append((slot, parent))
        receiver = apply(receiver, [Window(1, runs_of(pairs), (), window.commit)])
    have = Have(1, receiver.committed_tokens, spans_of(receiver.alive), 0)
    after = apply(receiver, missing(given_all(tree), have))
    assert after.committed == tree.committed
    assert after.alive == tree.alive

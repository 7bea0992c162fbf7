"""The stage's machine, rule by rule (DESIGN.md, "Rules of the protocol"): what it takes, computes, forwards and refuses."""

from __future__ import annotations

import pytest

from farflung.core.errors import LeaseExceeded, ProtocolViolation
from farflung.core.ids import SessionId
from farflung.core.messages import Answer, Have, StageTime, Window
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.protocol.credit import INITIAL_CREDIT_BYTES, RETURN_AT_BYTES, WINDOW_COST_BYTES
from farflung.protocol.events import (
    CreditReceived,
    Forward,
    HaveReceived,
    IdsReceived,
    OwnerAttached,
    OwnerLost,
    PredecessorUp,
    Reply,
    ReturnCredit,
    Settled,
    StageEffect,
    StageEvent,
    StepDone,
    StepStarted,
    SuccessorLost,
    SuccessorReplaced,
    SuccessorUp,
    TellHave,
    WindowReceived,
)
from farflung.protocol.limits import MAX_ALIVE_SLOTS, MAX_DEAD_SLOTS, MAX_EARLY_WINDOWS, MAX_WINDOW_ROWS
from farflung.protocol.outgoing import OutEdge
from farflung.protocol.receiving import check_ids
from farflung.protocol.stage import advance
from farflung.protocol.stage_state import StageState

ROW = 10
START = StepStarted(10**6)


def stage(**changes: object) -> StageState:
    """In the middle of a route, with its successor up."""
    base: dict[str, object] = {
        "session": SessionId("0" * 32),
        "epoch": 1,
        "row_bytes": ROW,
        "lease_tokens": 8,
        "context_tokens": 100_000,
        "max_slots": MAX_ALIVE_SLOTS,
        "out": OutEdge(epoch=1, row_bytes=ROW),
    }
    state = StageState(**(base | changes))  # type: ignore[arg-type]
    return state if state.out is None else run(state, SuccessorUp(begins=True))[0]


def tail(**changes: object) -> StageState:
    """With the owner's line up."""
    return stage(**({"out": None, "owner_attached": True} | changes))


def run(state: StageState, *events: StageEvent) -> tuple[StageState, list[StageEffect]]:
    seen: list[StageEffect] = []
    for event in events:
        state, effects = advance(state, event)
        seen.extend(effects)
    return state, seen


def path(first: int, count: int, parent: int, start: int, *, want: bool = False, row: int = ROW) -> WindowReceived:
    """A window of committed slots, as a prompt chunk or a plain decode step is."""
    commit = Commit(start, (SlotSpan(first, count),))
    wanted = (SlotSpan(first + count - 1, 1),) if want else ()
    window = Window(1, (SlotRun(first, count, parent),), wanted, commit, first + count)
    return WindowReceived(window, b"".join(bytes([slot]) * row for slot in range(first, first + count)))


def guess(*pairs: tuple[int, int], commit: Commit | None = None, want: bool = True) -> WindowReceived:
    """A window of slots that are not committed, one run each."""
    runs = tuple(SlotRun(slot, 1, parent) for slot, parent in pairs)
    wanted = tuple(SlotSpan(slot, 1) for slot, _ in pairs) if want else ()
    last = max((slot + 1 for slot, _ in pairs), default=0)
    return WindowReceived(Window(1, runs, wanted, commit, last), b"".join(bytes([slot]) * ROW for slot, _ in pairs))


def computed(*tokens: int) -> tuple[StageEvent, StageEvent]:
    return START, StepDone(tokens)


def forwards(effects: list[StageEffect]) -> list[Window]:
    return [effect.window for effect in effects if isinstance(effect, Forward)]


def answers(effects: list[StageEffect]) -> list[Answer]:
    return [effect.answer for effect in effects if isinstance(effect, Reply)]


def told(effects: list[StageEffect]) -> Have:
    (have,) = [effect.have for effect in effects if isinstance(effect, TellHave)]
    return have


# -- order and credit ----------------------------------------------------------------------------------------------------


def test_windows_are_computed_and_forwarded_in_order() -> None:
    state, _ = run(stage(), path(0, 2, -1, 0), path(2, 1, 1, 2, want=True))
    assert state.ready is not None
    assert state.ready.window.runs == (SlotRun(0, 2, -1),)
    state, _ = run(state, START)
    assert state.ready is None
    state, effects = run(state, StepDone())
    assert forwards(effects) == [path(0, 2, -1, 0).window]
    state, effects = run(state, *computed())
    assert forwards(effects) == [path(2, 1, 1, 2, want=True).window]
    assert state.ready is None


def test_without_credit_of_the_successor_rows_wait_and_then_leave_in_order() -> None:
    state = stage(out=OutEdge(epoch=1, row_bytes=INITIAL_CREDIT_BYTES))
    state, _ = run(state, path(0, 1, -1, 0), path(1, 1, 0, 1), path(2, 1, 1, 2))
    state, sent = run(state, *computed(), *computed())
    assert [window.runs[0].first for window in forwards(sent)] == [0]
    assert state.ready is None, "nothing more is computed while rows wait for the successor"
    state, effects = run(state, CreditReceived(INITIAL_CREDIT_BYTES))
    assert [window.runs[0].first for window in forwards(effects)] == [1]
    assert state.ready is not None


def test_credit_goes_back_to_the_predecessor_in_lumps_once_computed() -> None:
    rows = RETURN_AT_BYTES // 1024 + 1
    state = stage(row_bytes=1024, lease_tokens=rows + 1)
    window = Window(1, (SlotRun(0, rows, -1),), (), Commit(0, (SlotSpan(0, rows),)))
    state, effects = run(state, WindowReceived(window, bytes(rows * 1024)), START)
    assert effects == []
    state, effects = run(state, StepDone())
    assert ReturnCredit(rows * 1024 + WINDOW_COST_BYTES) in effects


def test_windows_without_rows_use_up_credit_like_others() -> None:
    empty = WindowReceived(Window(1, ()), b"")
    state, _ = run(stage(), *[empty] * (INITIAL_CREDIT_BYTES // WINDOW_COST_BYTES))
    with pytest.raises(ProtocolViolation, match="without credit"):
        run(state, empty)


def test_a_long_prompt_chunk_is_computed_and_forwarded_in_parts() -> None:
    state, effects = run(stage(), path(0, 5, -1, 0, want=True), StepStarted(2), StepDone(), StepStarted(2), StepDone())
    assert state.queue[0].payload == b"\4" * ROW
    state, more = run(state, *computed())
    windows = forwards(effects + more)
    assert [window.runs for window in windows] == [(SlotRun(0, 2, -1),), (SlotRun(2, 2, 1),), (SlotRun(4, 1, 3),)]
    assert [window.commit and window.commit.stop for window in windows] == [2, 4, 5]
    assert [window.want for window in windows] == [(), (), (SlotSpan(4, 1),)]
    assert [window.next_slot for window in windows] == [2, 4, 5]
    assert state.receiver.owed == 5 * ROW + WINDOW_COST_BYTES


def test_pieces_of_the_token_tree_are_never_computed_in_parts() -> None:
    state, _ = run(stage(), guess((0, -1), (1, -1), (2, -1)), StepStarted(1))
    assert state.queue[0].window.rows == 3


def test_a_timed_window_takes_each_stages_times_along() -> None:
    time = StageTime(1.0, 2.0, 3.0, 4)
    event = WindowReceived(Window(1, (SlotRun(0, 1, -1),), timeline=()), bytes(ROW))
    _, effects = run(stage(), event, START, StepDone(time=time))
    assert forwards(effects)[0].timeline == (time,)


# -- answers -------------------------------------------------------------------------------------------------------------


def test_the_tail_answers_wanted_slots_and_says_what_is_committed() -> None:
    state, _ = run(tail(), path(0, 2, -1, 0), path(2, 1, 1, 2, want=True))
    state, effects = run(state, *computed())
    assert answers(effects) == [], "a prompt chunk: nobody waits for its acknowledgement"
    state, effects = run(state, *computed(77))
    assert answers(effects) == [Answer((SlotSpan(2, 1),), (77,), 3, 3)]


def test_an_agreeing_overlap_does_not_lower_what_is_acknowledged() -> None:
    again = Window(1, (SlotRun(3, 1, 2),), (SlotSpan(3, 1),), Commit(0, (SlotSpan(0, 4),)))
    state, _ = run(tail(), path(0, 3, -1, 0), *computed())
    _, effects = run(state, WindowReceived(again, bytes(ROW)), *computed(5))
    assert [answer.committed_tokens for answer in answers(effects)] == [4]


def test_an_answer_acknowledges_only_commits_that_were_computed() -> None:
    state, _ = run(tail(), path(0, 2, -1, 0, want=True), path(2, 1, 1, 2, want=True))
    _, effects = run(state, *computed(5))
    assert [answer.committed_tokens for answer in answers(effects)] == [2]


def test_where_every_wanted_slot_died_the_acknowledgement_still_goes_out() -> None:
    state, _ = run(tail(), path(0, 1, -1, 0), path(1, 1, 0, 1), *computed(), *computed())
    _, effects = run(state, guess((2, 0)), *computed())
    assert answers(effects) == [Answer((), (), 2, 3)]


def test_the_tail_holds_answers_until_the_owner_is_there() -> None:
    state, effects = run(tail(owner_attached=False), path(0, 1, -1, 0, want=True), *computed(7))
    assert answers(effects) == []
    _, effects = run(state, OwnerAttached())
    assert [answer.tokens for answer in answers(effects)] == [(7,)]


def test_answers_are_kept_and_given_again_until_the_commit_that_covers_them() -> None:
    state, effects = run(tail(), path(0, 1, -1, 0, want=True), *computed(7))
    assert [answer.tokens for answer in answers(effects)] == [(7,)]
    state, effects = run(state, OwnerLost(), guess((1, 0), (2, 0)), *computed(8, 9))
    assert answers(effects) == []
    state, effects = run(state, OwnerAttached())
    assert answers(effects) == [Answer((SlotSpan(0, 3),), (7, 8, 9), 1, 3)]
    commit = Commit(1, (SlotSpan(2, 1),))
    state, _ = run(state, WindowReceived(Window(1, (), (), commit), b""), *computed())
    _, effects = run(state, OwnerAttached())
    assert answers(effects) == [Answer((SlotSpan(2, 1),), (9,), 2, 3)], "slot 2 is the root, 0 is covered, 1 is dead"


def test_a_row_that_comes_again_where_its_answer_exists_has_it_sent_again() -> None:
    state, _ = run(tail(), guess((0, -1)), *computed(7))
    state, effects = run(state, guess((0, -1)))
    assert [answer.tokens for answer in answers(effects)] == [(7,)]


# -- committed, alive, dead ----------------------------------------------------------------------------------------------


def test_dead_rows_are_dropped_before_computing_and_the_rest_travels() -> None:
    """Slots 1 and 2 are siblings; the next window commits 1 and brings a child for each."""
    children = Window(1, (SlotRun(3, 1, 2), SlotRun(4, 2, 1)), (SlotSpan(3, 3),), Commit(1, (SlotSpan(1, 1),)))
    state, _ = run(stage(), path(0, 1, -1, 0), guess((1, 0), (2, 0)))
    state, _ = run(state, WindowReceived(children, b"c" * ROW + b"d" * ROW + b"e" * ROW, at_s=5.0))
    last = state.queue[-1]
    assert last.window.runs == (SlotRun(4, 2, 1),)
    assert last.window.want == (SlotSpan(4, 2),)
    assert last.payload == b"d" * ROW + b"e" * ROW
    assert last.credit_bytes == 3 * ROW + WINDOW_COST_BYTES
    assert last.at_s == 5.0


def test_rows_that_die_while_they_wait_are_dropped_when_their_step_starts() -> None:
    state, _ = run(stage(), path(0, 1, -1, 0), *computed(), guess((1, 0), (2, 0)), guess(commit=Commit(1, (SlotSpan(2, 1),))))
    state, _ = run(state, START)
    assert state.queue[0].window.runs == (SlotRun(2, 1, 0),)
    assert state.queue[0].payload == b"\2" * ROW


def test_rows_that_die_while_they_wait_for_credit_are_not_sent() -> None:
    state, _ = run(stage(out=OutEdge(epoch=1, row_bytes=INITIAL_CREDIT_BYTES)), path(0, 1, -1, 0), *computed())
    state, _ = run(state, guess((1, 0), (2, 0)), *computed(), guess(commit=Commit(1, (SlotSpan(2, 1),))))
    _, effects = run(state, CreditReceived(WINDOW_COST_BYTES + 1))
    assert [window.runs for window in forwards(effects)] == [(SlotRun(2, 1, 0),)]


def test_a_window_whose_rows_are_all_dead_travels_as_a_header() -> None:
    state, _ = run(stage(), path(0, 1, -1, 0), path(1, 1, 0, 1), *computed(), *computed())
    state, effects = run(state, guess((2, 0)), *computed())
    assert forwards(effects) == [Window(1, (), (), None, 3)]


def test_what_settles_is_told_with_the_dead_that_were_held_or_just_came() -> None:
    state, effects = run(stage(), path(0, 1, -1, 0), *computed())
    assert [effect for effect in effects if isinstance(effect, Settled)] == [Settled(0, (0,), frozenset())]
    siblings = guess((1, 0), (2, 0), (3, 1))
    state, effects = run(state, siblings, *computed(), guess((4, 2), commit=Commit(1, (SlotSpan(2, 1), SlotSpan(4, 1)))))
    _, effects = run(state, *computed())
    assert [effect for effect in effects if isinstance(effect, Settled)] == [Settled(1, (2, 4), frozenset({1, 3}))]


# -- leases and limits ---------------------------------------------------------------------------------------------------


def test_more_tokens_than_the_lease_are_refused() -> None:
    with pytest.raises(LeaseExceeded, match="9 rows is larger than the lease of 8"):
        run(stage(), path(0, 9, -1, 0))
    with pytest.raises(LeaseExceeded, match="9 tokens would be in use, the lease is 8"):
        run(stage(), path(0, 6, -1, 0), guess((6, 5), (7, 5), (8, 7)))


def test_slots_that_a_window_kills_do_not_count_for_the_lease() -> None:
    wrong = guess(*[(slot, 3) for slot in range(4, 8)])
    right = path(8, 4, 3, 4)
    state, _ = run(stage(), path(0, 4, -1, 0), wrong, right)
    assert state.tree.tokens == 8


def test_rows_of_a_window_and_slots_that_are_not_committed_are_bounded_whatever_the_lease() -> None:
    state = stage(lease_tokens=100_000, row_bytes=1)
    many = Window(1, (SlotRun(0, MAX_WINDOW_ROWS + 1, -1),))
    with pytest.raises(ProtocolViolation, match="at most 512"):
        run(state, WindowReceived(many, bytes(MAX_WINDOW_ROWS + 1)))
    windows = [
        WindowReceived(Window(1, (SlotRun(first, MAX_WINDOW_ROWS, first - 1),)), bytes(MAX_WINDOW_ROWS))
        for first in range(0, MAX_ALIVE_SLOTS + 1, MAX_WINDOW_ROWS)
    ]
    state, _ = run(state, *windows[:-1])
    with pytest.raises(ProtocolViolation, match="not committed"):
        run(state, windows[-1])


# -- edges that break ----------------------------------------------------------------------------------------------------


def test_a_new_line_of_the_predecessor_is_told_what_is_held_and_what_may_be_sent() -> None:
    state, _ = run(stage(), path(0, 3, -1, 0), *computed(), guess((3, 2), (5, 3)), guess((9, 8)))
    state, effects = run(state, PredecessorUp(epoch=1, asks_have=True))
    queued = 2 * ROW + WINDOW_COST_BYTES
    assert told(effects) == Have(1, 3, (SlotSpan(3, 1), SlotSpan(5, 1)), INITIAL_CREDIT_BYTES - queued)
    assert state.early == (), "what never got in is sent again"
    state, effects = run(state, PredecessorUp(epoch=1, asks_have=False))
    assert effects == []


def test_the_predecessor_may_come_again_while_a_window_is_being_computed() -> None:
    state, _ = run(stage(), path(0, 3, -1, 0), START)
    state, effects = run(state, PredecessorUp(epoch=1, asks_have=True))
    assert told(effects).committed_tokens == 3
    state, effects = run(state, path(0, 3, -1, 0), StepDone())
    assert [window.runs for window in forwards(effects)] == [(SlotRun(0, 3, -1),)]
    assert state.queue[0].window.rows == 0


def test_windows_of_an_older_epoch_are_refused_once_the_edge_is_renewed() -> None:
    state, _ = run(stage(), PredecessorUp(epoch=2, asks_have=True))
    with pytest.raises(ProtocolViolation, match="epoch 1 came on an edge of epoch 2"):
        run(state, path(0, 1, -1, 0))


def test_rows_that_are_held_are_not_taken_again() -> None:
    state, _ = run(stage(), path(0, 3, -1, 0), *computed(), guess((3, 2)), *computed())
    state, effects = run(state, path(0, 3, -1, 0), guess((3, 2), (4, 3)), *computed(), *computed())
    assert [window.runs for window in forwards(effects)] == [(), (SlotRun(4, 1, 3),)]


def test_a_held_slot_in_another_place_is_a_violation() -> None:
    state, _ = run(stage(), path(0, 1, -1, 0), guess((1, 0), (2, 0)))
    with pytest.raises(ProtocolViolation, match="slot 2 came under slot 0 before, and now under slot 1"):
        run(state, guess((2, 1)))


def test_a_window_that_came_before_one_it_builds_on_waits_for_it() -> None:
    first, second = path(0, 2, -1, 0), path(2, 1, 1, 2)
    third, fourth = guess((3, 2), (4, 2)), guess(commit=Commit(3, (SlotSpan(4, 1),)))
    state, _ = run(stage(), fourth, third, second)
    assert (len(state.early), state.queue) == (3, ())
    state, _ = run(state, first)
    assert [pending.window for pending in state.queue] == [first.window, second.window, third.window, fourth.window]
    assert state.tree.root == 4


def test_windows_that_wait_for_one_that_never_comes_are_bounded() -> None:
    state, _ = run(stage(), *[guess((9, 5))] * MAX_EARLY_WINDOWS)
    with pytest.raises(ProtocolViolation, match="another came"):
        run(state, guess((9, 5)))


def test_what_was_computed_while_the_successor_was_away_goes_out_as_far_as_it_is_missing() -> None:
    state, _ = run(stage(), path(0, 3, -1, 0), *computed(), SuccessorLost())
    state, effects = run(state, path(3, 2, 2, 3), guess((5, 4), (6, 4)), *computed(), *computed())
    assert forwards(effects) == []
    state, effects = run(state, SuccessorUp(begins=False))
    assert forwards(effects) == [], "not before it has said what it holds"
    state, effects = run(state, HaveReceived(Have(1, 3, (SlotSpan(5, 1),), INITIAL_CREDIT_BYTES)))
    rows, alive = forwards(effects)
    assert rows == Window(1, (SlotRun(3, 2, 2),), (), Commit(3, (SlotSpan(3, 2),)))
    assert alive == Window(1, (SlotRun(6, 1, 4),), (SlotSpan(6, 1),), None, 7)


def test_a_successor_that_was_replaced_gets_everything_under_the_new_epoch() -> None:
    state, _ = run(stage(), path(0, 3, -1, 0), *computed(), SuccessorReplaced(epoch=2))
    state, effects = run(state, SuccessorUp(begins=True))
    assert forwards(effects)[0] == Window(2, (SlotRun(0, 3, -1),), (), Commit(0, (SlotSpan(0, 3),)))
    _, effects = run(state, guess((3, 2)), *computed())
    assert [window.epoch for window in forwards(effects)] == [2]


def test_a_stage_behind_its_successor_forwards_only_what_that_one_lacks() -> None:
    """As a replacement is, that computes the session anew."""
    state, effects = run(stage(), SuccessorLost(), SuccessorUp(begins=False))
    state, effects = run(state, HaveReceived(Have(1, 4, (SlotSpan(6, 1),), INITIAL_CREDIT_BYTES)))
    assert forwards(effects) == []
    state, effects = run(state, path(0, 3, -1, 0), path(3, 3, 2, 3), *computed(), *computed())
    assert forwards(effects) == [
        Window(1, (), (), None, 3),
        Window(1, (SlotRun(4, 2, 3),), (), Commit(4, (SlotSpan(4, 2),)), 6),
    ]
    _, effects = run(state, guess((6, 5), (7, 5)), *computed())
    assert [window.runs for window in forwards(effects)] == [(SlotRun(7, 1, 5),)]


def test_slots_that_died_on_their_way_are_told_again_where_their_header_was_lost() -> None:
    state, _ = run(stage(), path(0, 1, -1, 0), *computed(), SuccessorLost())
    state, _ = run(state, WindowReceived(Window(1, (), (), None, next_slot=9), b""), *computed(), SuccessorUp(begins=False))
    _, effects = run(state, HaveReceived(Have(1, 1, (), INITIAL_CREDIT_BYTES)))
    assert forwards(effects) == [Window(1, (), (), None, 9)]


def test_without_a_successor_a_stage_computes_no_more_than_a_grant_of_bytes() -> None:
    state, _ = run(stage(out=OutEdge(epoch=1, row_bytes=INITIAL_CREDIT_BYTES // 2)), SuccessorLost())
    state, _ = run(state, path(0, 1, -1, 0), path(1, 1, 0, 1), path(2, 1, 1, 2), *computed())
    assert state.ready is not None
    state, _ = run(state, *computed())
    assert state.ready is None


# -- token ids at the tail -----------------------------------------------------------------------------------------------


def test_where_sampling_looks_back_a_window_waits_for_its_tokens_in_whatever_order_they_come() -> None:
    state, _ = run(tail(needs_ids=True), path(0, 2, -1, 0), IdsReceived((1,), (71,)))
    assert state.ready is None
    state, _ = run(state, IdsReceived((2, 0, 1), (72, 70, 99)))
    assert state.ready is not None
    state, _ = run(state, START)
    assert state.step_ids == (70, 71), "the first that came for a slot stands"
    state, _ = run(state, StepDone())
    assert (state.ids, state.step_ids) == ({2: 72}, ())


def test_nobody_waits_for_the_tokens_of_the_dead() -> None:
    state, _ = run(tail(needs_ids=True), path(0, 1, -1, 0), IdsReceived((0,), (70,)), *computed())
    state, _ = run(state, guess((1, 0), (2, 0)), guess(commit=Commit(1, (SlotSpan(2, 1),))), IdsReceived((2,), (72,)))
    assert state.ready is not None
    state, _ = run(state, START)
    assert state.step_ids == (72,)


def test_tokens_that_are_told_ahead_are_bounded() -> None:
    state = tail(needs_ids=True, max_slots=4)
    state, _ = run(state, IdsReceived(tuple(range(12)), (7,) * 12))
    with pytest.raises(ProtocolViolation, match="13 slots were told"):
        run(state, IdsReceived((12,), (7,)))


def test_tokens_that_nobody_looks_at_or_too_many_are_a_violation() -> None:
    with pytest.raises(ProtocolViolation):
        check_ids(tail(), 1)
    wanting = tail(needs_ids=True)
    check_ids(wanting, wanting.lease_tokens)
    with pytest.raises(ProtocolViolation):
        check_ids(wanting, wanting.lease_tokens + wanting.max_slots + 1)


@pytest.mark.parametrize(
    "window",
    [
        Window(1, (), (), Commit(0, (SlotSpan(0, 2000),)), 5),
        Window(1, (), (), None, 2**40),
        Window(1, (), (), None, -1),
        Window(1, (), (), None, 5, (StageTime(0, 0, 0, 0),) * 9),
    ],
    ids=[
        "a commit of more than can be alive",
        "slots beyond all numbers",
        "fewer than none",
        "times of more stages than passed",
    ],
)
def test_what_a_window_says_of_itself_is_bounded(window: Window) -> None:
    with pytest.raises(ProtocolViolation):
        advance(tail(lease_tokens=4096), WindowReceived(window, b""))


def test_positions_lie_within_the_context_though_the_lease_has_room_for_guesses() -> None:
    state, _ = run(tail(lease_tokens=64, context_tokens=6), path(0, 6, -1, 0))
    with pytest.raises(LeaseExceeded, match="position 6"):
        run(state, guess((6, 5)))
    with pytest.raises(LeaseExceeded, match="position 6"):
        run(tail(lease_tokens=64, context_tokens=6), path(0, 7, -1, 0))


def test_dead_slots_are_remembered_up_to_a_bound() -> None:
    """A run under a slot below the root is dead when it comes, and takes no lease."""
    state, _ = run(tail(lease_tokens=4096), path(0, 2, -1, 0))
    floods = [
        WindowReceived(Window(1, (SlotRun(first, 500, -1),), (), None, first + 500), bytes(500 * ROW))
        for first in range(10, 10 + 500 * (2 + MAX_DEAD_SLOTS // 500), 500)
    ]
    with pytest.raises(ProtocolViolation, match="dead"):
        run(state, *floods)


# -- what breaks a rule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        WindowReceived(Window(2, (SlotRun(1, 1, 0),)), bytes(ROW)),
        WindowReceived(Window(1, (SlotRun(1, 1, 0),)), bytes(ROW + 1)),
        WindowReceived(Window(1, (SlotRun(1, 1, 0),), (SlotSpan(5, 1),)), bytes(ROW)),
        WindowReceived(Window(1, (SlotRun(1, 1, 0),), (SlotSpan(0, 2**30),)), bytes(ROW)),
        WindowReceived(Window(1, (SlotRun(1, 1, 0),), (), Commit(0, (SlotSpan(0, 2**30),))), bytes(ROW)),
        WindowReceived(Window(1, (SlotRun(1, 2, 0),), (), Commit(1, (SlotSpan(2, 1),))), bytes(2 * ROW)),
        WindowReceived(Window(1, (SlotRun(1, 1, 0),), (), Commit(0, (SlotSpan(1, 1),))), bytes(ROW)),
        CreditReceived(1),
        HaveReceived(Have(1, 0, (), 0)),
    ],
    ids=["epoch", "size", "foreign want", "huge want", "huge commit", "no path", "contradiction", "credit", "have"],
)
def test_what_breaks_a_rule_is_a_violation(event: StageEvent) -> None:
    state, _ = run(stage(), path(0, 1, -1, 0))
    with pytest.raises(ProtocolViolation):
        run(state, event)


def test_the_tail_has_no_successor() -> None:
    with pytest.raises(ProtocolViolation):
        run(tail(), CreditReceived(1))

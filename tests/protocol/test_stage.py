"""The stage's machine: order, credit, leases, dead slots, and what it refuses."""

import pytest

from farflung.core.errors import LeaseExceeded, ProtocolViolation
from farflung.core.ids import SessionId
from farflung.core.messages import Window
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.protocol.credit import INITIAL_CREDIT_BYTES, RETURN_AT_BYTES, WINDOW_COST_BYTES
from farflung.protocol.limits import MAX_ALIVE_SLOTS, MAX_WINDOW_ROWS
from farflung.protocol.stage import (
    CreditReceived,
    Forward,
    OwnerAttached,
    Reply,
    ReturnCredit,
    StageEffect,
    StageEvent,
    StageState,
    StepDone,
    StepStarted,
    WindowReceived,
    advance,
)

ROW = 10


def stage(**changes: object) -> StageState:
    base: dict[str, object] = {
        "session": SessionId("0" * 32),
        "epoch": 1,
        "is_first": False,
        "is_tail": False,
        "row_bytes": ROW,
        "lease_tokens": 8,
    }
    return StageState(**(base | changes))  # type: ignore[arg-type]


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
    return WindowReceived(Window(1, (SlotRun(first, count, parent),), wanted, commit), bytes(range(count * row)))


def done(rows: bytes | None = b"out", tokens: tuple[int, ...] = ()) -> StepDone:
    return StepDone(rows, tokens, queue_rows=0, step_ms=1.0)


def test_windows_are_computed_and_forwarded_in_order() -> None:
    state, _ = run(stage(), path(0, 2, -1, 0), path(2, 1, 1, 2, want=True))
    assert state.ready is not None
    assert state.ready.window.runs == (SlotRun(0, 2, -1),)
    state, effects = run(state, StepStarted())
    assert state.ready is None
    state, effects = run(state, done(b"first"))
    assert [effect.payload for effect in effects if isinstance(effect, Forward)] == [b"first"]
    state, effects = run(state, StepStarted(), done(b"second"))
    assert [effect.payload for effect in effects if isinstance(effect, Forward)] == [b"second"]
    assert state.ready is None


def test_without_credit_of_the_successor_rows_wait_and_then_leave_in_order() -> None:
    state, _ = run(stage(), path(0, 1, -1, 0), path(1, 1, 0, 1), path(2, 1, 1, 2))
    big = bytes(INITIAL_CREDIT_BYTES)
    state, first = run(state, StepStarted(), done(big))
    state, rest = run(state, StepStarted(), done(b"b"))
    assert [type(effect) for effect in first + rest] == [Forward]
    assert state.ready is None, "nothing more is computed while rows wait for the successor"
    state, effects = run(state, CreditReceived(INITIAL_CREDIT_BYTES))
    assert [effect.payload for effect in effects if isinstance(effect, Forward)] == [b"b"]
    assert state.ready is not None


def test_credit_goes_back_to_the_predecessor_in_lumps_once_computed() -> None:
    rows = RETURN_AT_BYTES // 1024 + 1
    state = stage(row_bytes=1024, lease_tokens=rows + 1)
    window = Window(1, (SlotRun(0, rows, -1),), (), Commit(0, (SlotSpan(0, rows),)))
    state, effects = run(state, WindowReceived(window, bytes(rows * 1024)), StepStarted())
    assert effects == []
    state, effects = run(state, done())
    assert ReturnCredit(rows * 1024 + WINDOW_COST_BYTES) in effects


def test_the_tail_answers_wanted_slots_and_says_what_is_committed() -> None:
    state, _ = run(stage(is_tail=True, owner_attached=True), path(0, 2, -1, 0), path(2, 1, 1, 2, want=True))
    state, effects = run(state, StepStarted(), done(None))
    assert effects == []
    state, effects = run(state, StepStarted(), done(None, (77,)))
    (reply,) = effects
    assert isinstance(reply, Reply)
    assert (reply.answer.slots, reply.answer.tokens, reply.answer.committed_tokens) == ((SlotSpan(2, 1),), (77,), 3)


def test_an_agreeing_overlap_does_not_lower_what_is_acknowledged() -> None:
    again = Window(1, (SlotRun(3, 1, 2),), (SlotSpan(3, 1),), Commit(0, (SlotSpan(0, 4),)))
    state, _ = run(stage(is_tail=True, owner_attached=True), path(0, 3, -1, 0), StepStarted(), done(None))
    _, effects = run(state, WindowReceived(again, bytes(ROW)), StepStarted(), done(None, (5,)))
    (reply,) = effects
    assert isinstance(reply, Reply)
    assert reply.answer.committed_tokens == 4


def test_where_every_wanted_slot_died_the_acknowledgement_still_goes_out() -> None:
    state, _ = run(stage(is_tail=True, owner_attached=True), path(0, 1, -1, 0), path(1, 1, 0, 1))
    orphan = Window(1, (SlotRun(2, 1, 0),), (SlotSpan(2, 1),))
    state, _ = run(state, StepStarted(), done(None), StepStarted(), done(None))
    _, effects = run(state, WindowReceived(orphan, bytes(ROW)), StepStarted(), done(None))
    (reply,) = effects
    assert isinstance(reply, Reply)
    assert (reply.answer.slots, reply.answer.committed_tokens) == ((), 2)


def test_windows_without_rows_use_up_credit_like_others() -> None:
    empty = WindowReceived(Window(1, ()), b"")
    state, _ = run(stage(), *[empty] * (INITIAL_CREDIT_BYTES // WINDOW_COST_BYTES))
    with pytest.raises(ProtocolViolation, match="without credit"):
        run(state, empty)


def test_rows_of_a_window_and_slots_in_flight_are_bounded_whatever_the_lease() -> None:
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


def test_an_answer_acknowledges_only_commits_that_were_computed() -> None:
    state, _ = run(stage(is_tail=True, owner_attached=True), path(0, 2, -1, 0, want=True), path(2, 1, 1, 2, want=True))
    _, effects = run(state, StepStarted(), done(None, (5,)))
    (reply,) = effects
    assert isinstance(reply, Reply)
    assert reply.answer.committed_tokens == 2


def test_the_tail_holds_answers_until_the_owner_is_there() -> None:
    state, _ = run(stage(is_tail=True), path(0, 1, -1, 0, want=True), StepStarted())
    state, effects = run(state, done(None, (7,)))
    assert effects == []
    state, effects = run(state, OwnerAttached())
    assert [effect.answer.tokens for effect in effects if isinstance(effect, Reply)] == [(7,)]
    assert run(state, OwnerAttached())[1] == []


def test_dead_rows_are_dropped_before_computing_and_the_rest_travels() -> None:
    """Slots 1 and 2 are siblings; the next window commits 1 and brings a child for each."""
    siblings = Window(1, (SlotRun(1, 1, 0), SlotRun(2, 1, 0)), (SlotSpan(1, 2),))
    children = Window(1, (SlotRun(3, 1, 2), SlotRun(4, 2, 1)), (SlotSpan(3, 3),), Commit(1, (SlotSpan(1, 1),)))
    state, _ = run(stage(), path(0, 1, -1, 0), WindowReceived(siblings, b"a" * ROW + b"b" * ROW))
    state, _ = run(state, WindowReceived(children, b"c" * ROW + b"d" * ROW + b"e" * ROW))
    last = state.queue[-1]
    assert last.window.runs == (SlotRun(4, 2, 1),)
    assert last.window.want == (SlotSpan(4, 2),)
    assert last.payload == b"d" * ROW + b"e" * ROW
    assert last.received_bytes == 3 * ROW


def test_a_window_whose_rows_are_all_dead_travels_as_a_header() -> None:
    state, _ = run(stage(), path(0, 1, -1, 0), path(1, 1, 0, 1))
    orphan = Window(1, (SlotRun(2, 1, 0),), (SlotSpan(2, 1),))
    state, _ = run(state, WindowReceived(orphan, bytes(ROW)))
    assert state.queue[-1].window == Window(1, (), (), None)
    assert state.queue[-1].payload == b""


def test_more_tokens_than_the_lease_are_refused() -> None:
    with pytest.raises(LeaseExceeded, match="9 rows is larger than the lease of 8"):
        run(stage(), path(0, 9, -1, 0))
    with pytest.raises(LeaseExceeded, match="9 tokens would be in use, the lease is 8"):
        run(stage(), path(0, 6, -1, 0), path(6, 3, 5, 6))


@pytest.mark.parametrize(
    "event",
    [
        WindowReceived(Window(2, (SlotRun(1, 1, 0),)), bytes(ROW)),
        WindowReceived(Window(1, (SlotRun(1, 1, 0),)), bytes(ROW + 1)),
        WindowReceived(Window(1, (SlotRun(0, 1, -1),)), bytes(ROW)),
        WindowReceived(Window(1, (SlotRun(1, 1, 0),), (SlotSpan(5, 1),)), bytes(ROW)),
        WindowReceived(Window(1, (SlotRun(1, 1, 0),), (SlotSpan(0, 2**30),)), bytes(ROW)),
        WindowReceived(Window(1, (SlotRun(1, 1, 0),), (), Commit(0, (SlotSpan(0, 2**30),))), bytes(ROW)),
        WindowReceived(Window(1, (SlotRun(1, 1, 0),), (), Commit(2, (SlotSpan(1, 1),))), bytes(ROW)),
        CreditReceived(1),
    ],
    ids=["epoch", "size", "reused slot", "foreign want", "huge want", "huge commit", "gap", "unearned credit"],
)
def test_what_breaks_a_rule_is_a_violation(event: StageEvent) -> None:
    state, _ = run(stage(), path(0, 1, -1, 0))
    with pytest.raises(ProtocolViolation):
        run(state, event)

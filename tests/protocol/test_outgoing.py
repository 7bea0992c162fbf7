"""The sending end of an edge: down, asking, up; what is remembered, clipped and dropped."""

from __future__ import annotations

import pytest

from farflung.core.errors import ProtocolViolation
from farflung.core.messages import Have, Window
from farflung.core.tree import TokenTree
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.protocol import outgoing
from farflung.protocol.credit import INITIAL_CREDIT_BYTES, WINDOW_COST_BYTES
from farflung.protocol.limits import MAX_ALIVE_SLOTS
from farflung.protocol.outgoing import EdgeStatus, OutEdge
from farflung.protocol.windows import Given

ROW = 100


class Sender:
    """An edge with the tree it gives from."""

    def __init__(self, row_bytes: int = ROW, epoch: int = 1) -> None:
        self.edge = OutEdge(epoch=epoch, row_bytes=row_bytes)
        self.tree = TokenTree()
        self.sent: list[Window] = []

    @property
    def given(self) -> Given:
        return Given(self.tree, self.tree, frozenset())

    def push(self, window: Window) -> None:
        self.tree, _ = self.tree.add(window.runs)
        if window.commit is not None:
            self.tree, _ = self.tree.commit(window.commit)
        self.edge = outgoing.push(self.edge, window, self.tree)
        self.flush()

    def flush(self) -> None:
        self.edge, windows = outgoing.flush(self.edge, self.tree)
        self.sent += windows

    def begin(self) -> None:
        self.edge = outgoing.begin(self.edge, self.given)
        self.flush()

    def resume(self, have: Have) -> None:
        self.edge = outgoing.resume(outgoing.ask(self.edge), have, self.given)
        self.flush()

    def take_sent(self) -> list[Window]:
        sent, self.sent = self.sent, []
        return sent


def chunk(first: int, count: int) -> Window:
    """Of a prompt."""
    return Window(1, (SlotRun(first, count, first - 1),), (), Commit(first, (SlotSpan(first, count),)), first + count)


def test_while_an_edge_is_down_nothing_is_sent_and_only_bytes_are_counted() -> None:
    sender = Sender()
    sender.push(chunk(0, 4))
    assert (sender.sent, sender.edge.waiting, sender.edge.backlog_bytes) == ([], (), 4 * ROW)
    assert sender.edge.takes_more
    sender.edge = outgoing.push(sender.edge, Window(1, (SlotRun(4, 1, 3),)), sender.tree)
    big = Sender(row_bytes=INITIAL_CREDIT_BYTES)
    big.push(chunk(0, 1))
    assert not big.edge.takes_more


def test_a_session_that_begins_at_the_receiver_is_sent_without_asking() -> None:
    sender = Sender()
    sender.begin()
    assert sender.sent == [], "there is nothing yet"
    sender.push(chunk(0, 4))
    assert sender.take_sent() == [chunk(0, 4)]


def test_an_edge_that_asks_waits_for_have() -> None:
    sender = Sender()
    sender.push(chunk(0, 4))
    sender.edge = outgoing.ask(sender.edge)
    sender.push(chunk(4, 1))
    assert (sender.sent, sender.edge.status) == ([], EdgeStatus.ASKING)
    sender.edge = outgoing.resume(sender.edge, Have(1, 4, (), 5_000), sender.given)
    sender.flush()
    assert sender.take_sent()[0].runs == (SlotRun(4, 1, 3),)
    assert sender.edge.backlog_bytes == 0


def test_windows_carry_the_epoch_of_the_edge() -> None:
    sender = Sender(epoch=5)
    sender.begin()
    sender.push(chunk(0, 1))
    assert sender.sent[0].epoch == 5


def test_windows_wait_for_credit_in_order_and_one_may_overdraw_it() -> None:
    sender = Sender(row_bytes=INITIAL_CREDIT_BYTES)
    sender.begin()
    for first in range(3):
        sender.push(chunk(first, 1))
    assert [window.runs[0].first for window in sender.take_sent()] == [0]
    assert not sender.edge.takes_more
    sender.edge = outgoing.refill(sender.edge, INITIAL_CREDIT_BYTES)
    sender.flush()
    assert [window.runs[0].first for window in sender.take_sent()] == [1]
    sender.edge = outgoing.lost(sender.edge)
    assert (sender.edge.waiting, sender.edge.status) == ((), EdgeStatus.DOWN)


def test_what_the_receiver_still_has_to_compute_is_missing_from_the_credit() -> None:
    sender = Sender()
    sender.push(chunk(0, 2))
    sender.resume(Have(1, 0, (), -5))
    assert sender.sent == []
    sender.edge = outgoing.refill(sender.edge, 10)
    sender.flush()
    assert [window.rows for window in sender.take_sent()] == [2]
    assert sender.edge.credit.left == 5 - 2 * ROW - WINDOW_COST_BYTES


def test_rows_that_died_while_they_waited_are_not_sent_and_cost_nothing() -> None:
    sender = Sender()
    sender.push(chunk(0, 1))
    sender.resume(Have(1, 1, (), 0))
    sender.push(Window(1, (SlotRun(1, 1, 0), SlotRun(2, 1, 0)), (SlotSpan(1, 2),), None, 3))
    sender.push(Window(1, (), (), Commit(1, (SlotSpan(2, 1),)), 3))
    sender.edge = outgoing.refill(sender.edge, 1)
    sender.flush()
    assert [window.rows for window in sender.sent] == [0], "the header that tells what has gone out"
    sender.edge = outgoing.refill(sender.edge, WINDOW_COST_BYTES)
    sender.flush()
    assert sender.sent[1] == Window(1, (SlotRun(2, 1, 0),), (SlotSpan(2, 1),), None, 3)
    assert sender.edge.credit.left == 1 - ROW - WINDOW_COST_BYTES


def test_commits_are_gap_free_on_each_edge_from_what_the_receiver_has() -> None:
    """A commit that starts elsewhere is clipped, or begins where the edge's last one ended."""
    sender = Sender()
    sender.push(chunk(0, 4))
    sender.resume(Have(1, 6, (), 10_000))
    sender.push(chunk(4, 1))
    assert sender.take_sent()[-1].commit is None, "the receiver knows it"
    sender.push(chunk(5, 3))
    assert sender.take_sent()[-1].commit == Commit(6, (SlotSpan(6, 2),))
    sender.push(chunk(8, 1))
    assert sender.take_sent()[-1].commit == Commit(8, (SlotSpan(8, 1),))


def test_a_sender_behind_its_receiver_drops_rows_that_are_held_there() -> None:
    sender = Sender()
    sender.resume(Have(1, 3, (SlotSpan(3, 1), SlotSpan(7, 1)), 10_000))
    sender.push(chunk(0, 2))
    sender.push(Window(1, (SlotRun(2, 1, 1), SlotRun(3, 1, 2), SlotRun(4, 1, 3)), (SlotSpan(2, 3),), None, 5))
    assert [(window.runs, window.want) for window in sender.take_sent()] == [((), ()), ((SlotRun(4, 1, 3),), (SlotSpan(4, 1),))]
    sender.push(Window(1, (SlotRun(7, 1, 3),), (SlotSpan(7, 1),), Commit(2, (SlotSpan(2, 2),)), 8))
    (window,) = sender.take_sent()
    assert (window.runs, window.commit) == ((), Commit(3, (SlotSpan(3, 1),)))


def test_once_ahead_again_nothing_is_filtered_any_more() -> None:
    sender = Sender()
    sender.resume(Have(1, 3, (SlotSpan(3, 1),), 10_000))
    sender.push(chunk(0, 5))
    assert (sender.edge.held, sender.edge.held_tokens) == (frozenset(), 0)


@pytest.mark.parametrize(
    "have",
    [
        Have(2, 0, (), 0),
        Have(1, 0, (), INITIAL_CREDIT_BYTES + 1),
        Have(1, 0, (SlotSpan(0, 2**30),), 0),
        Have(1, 0, (SlotSpan(0, 1),) * (MAX_ALIVE_SLOTS + 1), 0),
    ],
    ids=["epoch", "credit", "huge", "many"],
)
def test_a_have_out_of_range_is_a_violation(have: Have) -> None:
    with pytest.raises(ProtocolViolation):
        Sender().resume(have)


def test_a_have_that_nobody_asked_for_is_a_violation() -> None:
    sender = Sender()
    with pytest.raises(ProtocolViolation, match="nobody asked"):
        outgoing.resume(sender.edge, Have(1, 0, (), 0), sender.given)
    sender.begin()
    with pytest.raises(ProtocolViolation, match="nobody asked"):
        outgoing.resume(sender.edge, Have(1, 0, (), 0), sender.given)

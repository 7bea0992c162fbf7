"""Hop credit never deadlocks and never lets more than one window over the grant; slot credit is the least of all grants."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import ProtocolViolation
from farflung.core.ids import NodeId
from farflung.core.tree import Place, TokenTree
from farflung.protocol.credit import (
    INITIAL_CREDIT_BYTES,
    INITIAL_SLOTS,
    WINDOW_COST_BYTES,
    ReceiverCredit,
    SenderCredit,
    SlotCredit,
)


@given(st.lists(st.integers(0, 3 * INITIAL_CREDIT_BYTES), max_size=60))
def test_whatever_the_sizes_every_window_gets_through_and_the_queue_stays_bounded(sizes: list[int]) -> None:
    sender, receiver = SenderCredit(), ReceiverCredit()
    todo, queue = list(sizes), list[int]()
    while todo or queue:
        while todo and sender.may_send:
            size = todo.pop(0)
            sender, receiver = sender.spend(size), receiver.receive(size)
            queue.append(size)
            assert sum(queue) <= INITIAL_CREDIT_BYTES + size
        assert queue, "nothing on its way and nothing may be sent: a deadlock"
        receiver, returned = receiver.computed(queue.pop(0))
        if returned:
            sender = sender.refill(returned)


A, B, C = (NodeId(digit * 64) for digit in "abc")


def test_a_window_without_credit_is_a_violation() -> None:
    receiver = ReceiverCredit().receive(INITIAL_CREDIT_BYTES)
    with pytest.raises(ProtocolViolation):
        receiver.receive(1)


@pytest.mark.parametrize("size", [0, -5, 1, 2**40])
def test_credit_beyond_the_grant_is_a_violation(size: int) -> None:
    with pytest.raises(ProtocolViolation):
        SenderCredit().refill(size)


@given(st.lists(st.integers(0, INITIAL_CREDIT_BYTES), max_size=6), st.integers(0, 6))
def test_after_a_broken_line_both_ends_agree_again_whatever_was_lost(sizes: list[int], computed: int) -> None:
    receiver, queue = ReceiverCredit(), list[int]()
    for size in sizes:
        if receiver.left <= 0:
            break
        receiver = receiver.receive(size)
        queue.append(size + WINDOW_COST_BYTES)
    for cost in queue[:computed]:
        receiver, _ = receiver.computed(cost)
    queue = queue[computed:]
    receiver = ReceiverCredit.resumed(sum(queue))
    sender = SenderCredit.told(receiver.left)
    for cost in queue:
        receiver, returned = receiver.computed(cost)
        if returned:
            sender = sender.refill(returned)
    assert sender.left == receiver.left == INITIAL_CREDIT_BYTES - receiver.owed
    assert sender.may_send


def test_a_receiver_cannot_let_more_be_sent_than_the_grant() -> None:
    with pytest.raises(ProtocolViolation):
        SenderCredit.told(INITIAL_CREDIT_BYTES + 1)


def test_slots_in_flight_are_bounded_by_the_least_grant() -> None:
    slots = SlotCredit(stages=3)
    assert slots.room(of(10), covered=4) == INITIAL_SLOTS - 6
    slots = slots.grant(A, 100).grant(B, 80)
    assert slots.granted == INITIAL_SLOTS, "the third may grant less"
    slots = slots.grant(C, 20)
    assert slots.room(of(10), covered=4) == 14
    assert slots.room(of(60), covered=4) == 0
    assert slots.grant(C, 50).granted == 50, "a stage that comes anew grants anew"
    many = TokenTree(next_slot=60, alive={slot: Place(slot - 1, slot) for slot in range(55, 60)})
    assert slots.room(many, covered=60) == slots.granted - 5, "answered slots hold KV until they are committed or dead"


@pytest.mark.parametrize("slots", [0, -1])
def test_a_grant_that_lets_nothing_through_is_a_violation(slots: int) -> None:
    with pytest.raises(ProtocolViolation):
        SlotCredit().grant(A, slots)


def of(next_slot: int) -> TokenTree:
    """A tree of which so many slots went out, all dead or committed by now."""
    return TokenTree(next_slot=next_slot)

"""Hop credit never deadlocks and never lets more than one window over the grant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import ProtocolViolation
from farflung.protocol.credit import INITIAL_CREDIT_BYTES, ReceiverCredit, SenderCredit


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


def test_a_window_without_credit_is_a_violation() -> None:
    receiver = ReceiverCredit().receive(INITIAL_CREDIT_BYTES)
    with pytest.raises(ProtocolViolation):
        receiver.receive(1)


@pytest.mark.parametrize("size", [0, -5, 1, 2**40])
def test_credit_beyond_the_grant_is_a_violation(size: int) -> None:
    with pytest.raises(ProtocolViolation):
        SenderCredit().refill(size)

"""The stage's side of one session, as a state machine.

    (StageState, event) -> (StageState, effects)

Windows come in order from the predecessor, wait in ``queue`` for the compute thread, and leave in the same order towards the
successor (``protocol.outgoing``), or from the tail as answers to the owner. Lines may break and come again at any time, to the
same peer or another: what is held stays held, and each end of an edge finds out what the other lacks. A rule that is broken
raises ``ProtocolViolation`` or ``LeaseExceeded``; the caller then ends the session. Rules are numbered in DESIGN.md, "Rules of
the protocol".
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from msgspec.structs import replace

from farflung.core.errors import ProtocolViolation
from farflung.core.messages import Answer, Have, Window
from farflung.core.sampling import TokenLogprob
from farflung.core.tree import TokenTree
from farflung.core.window import spans_of
from farflung.protocol import outgoing
from farflung.protocol.credit import ReceiverCredit
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
from farflung.protocol.limits import MAX_ANSWER_SLOTS
from farflung.protocol.outgoing import OutEdge
from farflung.protocol.receiving import only, receive, receive_ids
from farflung.protocol.stage_state import KeptAnswer, PendingWindow, StageState
from farflung.protocol.windows import Given, cut, is_committed_path, keep_rows, slots_of

Transition = tuple[StageState, tuple[StageEffect, ...]]


def advance(state: StageState, event: StageEvent) -> Transition:  # noqa: PLR0911 - one per kind of event
    """One transition. Raises ProtocolViolation or LeaseExceeded; the state is then to be thrown away."""
    match event:
        case WindowReceived():
            return _receive(state, event)
        case IdsReceived():
            return receive_ids(state, event), ()
        case StepStarted():
            return _start(state, event.max_rows), ()
        case StepDone():
            return _finish(state, event)
        case PredecessorUp():
            return _predecessor_up(state, event)
        case OwnerAttached():
            state = replace(state, owner_attached=True)
            return state, tuple(map(Reply, _kept_answers(state)))
        case OwnerLost():
            return replace(state, owner_attached=False), ()
        case _:
            return _successor(state, event)


# -- windows in ----------------------------------------------------------------------------------------------------------


def _receive(state: StageState, event: WindowReceived) -> Transition:
    state, repeated = receive(state, event)
    known = [slot for slot in repeated if slot in state.answers]
    if known and state.owner_attached:
        return state, tuple(map(Reply, _answers_of(state, known)))
    return state, ()


def _predecessor_up(state: StageState, event: PredecessorUp) -> Transition:
    queued = sum(pending.credit_bytes for pending in state.queue)
    state = replace(state, epoch=event.epoch, early=(), receiver=ReceiverCredit.resumed(queued))
    if not event.asks_have:
        return state, ()
    have = Have(state.epoch, state.tree.committed_tokens, spans_of(state.tree.alive), state.receiver.left)
    return state, (TellHave(have),)


# -- computing -----------------------------------------------------------------------------------------------------------


def _start(state: StageState, max_rows: int) -> StageState:
    """The oldest window goes to the compute thread: without what has died since it came; of a long one its first part."""
    pending, *rest = state.queue
    window, places = keep_rows(pending.window, state.tree.holds)
    if places is not None:
        event = only(state, WindowReceived(pending.window, pending.payload), window, places)
        pending = PendingWindow(window, event.payload, pending.credit_bytes, pending.at_s)
    parts = [pending]
    if window.rows > max_rows and is_committed_path(window):
        parts = list(_cut(state, pending, max(1, max_rows)))
    step_ids = tuple(state.ids[slot] for slot in slots_of(parts[0].window)) if state.needs_ids else ()
    dropped = state.queue[0].window.rows - window.rows
    queue = (*parts, *rest)
    return replace(state, computing=True, queue=queue, queue_rows=state.queue_rows - dropped, step_ids=step_ids)


def _cut(state: StageState, pending: PendingWindow, rows: int) -> Iterator[PendingWindow]:
    first, second = cut(pending.window, rows)
    size = rows * state.row_bytes
    yield PendingWindow(first, pending.payload[:size], size, pending.at_s)
    yield PendingWindow(second, pending.payload[size:], pending.credit_bytes - size, pending.at_s)


def _finish(state: StageState, event: StepDone) -> Transition:
    pending, *rest = state.queue
    window = pending.window
    receiver, returned = state.receiver.computed(pending.credit_bytes)
    computed, settled = _grown(state.computed, window)
    if event.time is not None and window.timeline is not None:
        window = replace(window, timeline=(*window.timeline, event.time))
    state = replace(
        state,
        queue=tuple(rest),
        queue_rows=state.queue_rows - window.rows,
        computing=False,
        receiver=receiver,
        computed=computed,
    )
    if state.needs_ids:
        left = {slot: token for slot, token in state.ids.items() if not (computed.knows(slot) or slot in state.tree.dead)}
        state = replace(state, ids=MappingProxyType(left), step_ids=())
    effects: tuple[StageEffect, ...] = () if settled is None else (settled,)
    if returned:
        effects += (ReturnCredit(returned),)
    if state.out is not None:
        state, sent = _flushed(replace(state, out=outgoing.push(state.out, window, state.computed)))
        return state, (*sent, *effects)
    slots = [slot for span in window.want for slot in span]
    logprobs: tuple[TokenLogprob | None, ...] = event.logprobs or (None,) * len(slots)
    answers = dict(state.answers)
    answers.update(zip(slots, map(KeptAnswer, event.tokens, logprobs), strict=True))
    tree = state.tree
    kept = {slot: answer for slot, answer in answers.items() if slot == tree.root or slot in tree.alive}
    fresh = replace(state, answers=MappingProxyType(answers))
    state = replace(state, answers=MappingProxyType(kept))
    if not state.owner_attached or (not slots and is_committed_path(window)):
        return state, effects  # a prompt chunk: nobody waits for its acknowledgement
    return state, (*map(Reply, _answers_of(fresh, slots, window, event.queue_rows)), *effects)


def _grown(before: TokenTree, window: Window) -> tuple[TokenTree, Settled | None]:
    """The tree of computed rows with one more window, and what is settled by it."""
    tree, _ = before.add(window.runs)  # none of them is dead: their parents were computed
    settled: Settled | None = None
    if window.commit is not None:
        tree, died = tree.commit(window.commit)
        start = before.committed_tokens
        if tree.committed_tokens > start:
            slots = tuple(slot for span in tree.committed_between(start, tree.committed_tokens) for slot in span)
            settled = Settled(start, slots, died)
    if window.next_slot > tree.next_slot:
        tree = replace(tree, next_slot=window.next_slot)
    return tree, settled


def _answers_of(state: StageState, slots: list[int], window: Window | None = None, queue_rows: int = 0) -> Iterator[Answer]:
    """The kept answers for ``slots``, in messages of bounded size; one without slots is an acknowledgement."""
    for start in range(0, max(1, len(slots)), MAX_ANSWER_SLOTS):
        some = slots[start : start + MAX_ANSWER_SLOTS]
        answers = [state.answers[slot] for slot in some]
        yield Answer(
            slots=spans_of(some),
            tokens=tuple(answer.token for answer in answers),
            committed_tokens=state.computed.committed_tokens,
            next_slot=state.computed.next_slot,
            queue_rows=queue_rows,
            logprobs=tuple(answer.logprob for answer in answers if answer.logprob is not None),
            timeline=None if window is None else window.timeline,
        )


def _kept_answers(state: StageState) -> Iterator[Answer]:
    """What the owner may have missed while it had no line."""
    if state.is_tail and state.computed.next_slot:
        yield from _answers_of(state, sorted(state.answers))


# -- windows out ---------------------------------------------------------------------------------------------------------


def _successor(state: StageState, event: StageEvent) -> Transition:
    out = state.out
    if out is None:
        raise ProtocolViolation("the tail has no successor")
    match event:
        case SuccessorUp(begins=True):
            out = outgoing.begin(out, _given(state))
        case SuccessorUp():
            out = outgoing.ask(out)
        case SuccessorLost():
            out = outgoing.lost(out)
        case SuccessorReplaced():
            out = OutEdge(epoch=event.epoch, row_bytes=out.row_bytes)
        case HaveReceived():
            out = outgoing.resume(out, event.have, _given(state))
        case CreditReceived():
            out = outgoing.refill(out, event.bytes)
    return _flushed(replace(state, out=out))


def _given(state: StageState) -> Given:
    return Given(state.computed, state.tree, state.wanted)


def _flushed(state: StageState) -> Transition:
    if state.out is None:
        return state, ()
    out, windows = outgoing.flush(state.out, state.tree)
    return replace(state, out=out), tuple(map(Forward, windows))

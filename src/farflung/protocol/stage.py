"""The stage's side of one session, as a state machine.

    (StageState, event) -> (StageState, effects)

Windows come in order from the predecessor, wait in ``queue`` for the compute thread, and leave in the same order towards the
successor as its credit allows, or from the tail as answers to the owner. A rule that is broken raises ``ProtocolViolation`` or
``LeaseExceeded``; the caller then ends the session. Rules are numbered in DESIGN.md, "Rules of the protocol".
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct, field
from msgspec.structs import replace

from farflung.core.errors import LeaseExceeded, ProtocolViolation
from farflung.core.ids import SessionId
from farflung.core.messages import Answer, Window
from farflung.core.tree import TokenTree
from farflung.core.window import SlotRun, spans_of
from farflung.protocol.credit import ReceiverCredit, SenderCredit
from farflung.protocol.limits import MAX_ALIVE_SLOTS, MAX_WINDOW_ROWS

Payload = bytes | memoryview


@dataclass(frozen=True)
class WindowReceived:
    """A window from the predecessor with its buffer: token ids at the first stage, coded rows at the others."""

    window: Window
    payload: Payload


@dataclass(frozen=True)
class StepStarted:
    """The first waiting window went to the compute thread."""


@dataclass(frozen=True)
class StepDone:
    """Its result: coded rows for the successor, or sampled tokens at the tail."""

    rows: bytes | None
    tokens: tuple[int, ...]
    queue_rows: int
    step_ms: float


@dataclass(frozen=True)
class CreditReceived:
    """From the successor."""

    bytes: int


@dataclass(frozen=True)
class OwnerAttached:
    """The owner's own line to this stage is up."""


@dataclass(frozen=True)
class Forward:
    """Send a window to the successor."""

    window: Window
    payload: Payload


@dataclass(frozen=True)
class Reply:
    """Send an answer to the owner."""

    answer: Answer


@dataclass(frozen=True)
class ReturnCredit:
    """Let the predecessor send that many more bytes."""

    bytes: int


StageEvent = WindowReceived | StepStarted | StepDone | CreditReceived | OwnerAttached
StageEffect = Forward | Reply | ReturnCredit


@dataclass(frozen=True)
class PendingWindow:
    """A window that waits for the compute thread, or is in it.

    Attributes:
        window, payload: with the slots that were alive when it came, no others.
        received_bytes: of the payload as it came, for the credit.
        committed_tokens: committed length with this window's commit.
        wants_answer: it wanted one as it came; where all wanted slots are dead the acknowledgement still goes out.
    """

    window: Window
    payload: Payload
    received_bytes: int
    committed_tokens: int
    wants_answer: bool


class StageState(Struct, frozen=True, kw_only=True):
    """One session at one stage.

    Attributes:
        session: its id.
        epoch: of the edge that brings windows.
        is_first: payloads are token ids, 4 bytes a slot, else coded rows of ``row_bytes``.
        is_tail: results are tokens.
        row_bytes: size of one incoming row.
        lease_tokens: the most committed + alive slots.
        tree: what was received, dead slots dropped.
        queue: windows not computed yet, oldest first.
        computing: the first of them is in the compute thread.
        outbox: windows computed, waiting for the successor's credit.
        held_answers: answers waiting for the owner's line (rule 4: the tail never dials a client).
    """

    session: SessionId
    epoch: int
    is_first: bool
    is_tail: bool
    row_bytes: int
    lease_tokens: int
    owner_attached: bool = False
    tree: TokenTree = field(default_factory=TokenTree)
    queue: tuple[PendingWindow, ...] = ()
    computing: bool = False
    outbox: tuple[Forward, ...] = ()
    held_answers: tuple[Answer, ...] = ()
    sender: SenderCredit = field(default_factory=SenderCredit)
    receiver: ReceiverCredit = field(default_factory=ReceiverCredit)

    @property
    def ready(self) -> PendingWindow | None:
        """The window to compute next: none while one is being computed, or while the successor has not taken the last one's
        rows - what waits here is bounded by what the predecessor may send, not by what it turns into."""
        return None if self.computing or self.outbox or not self.queue else self.queue[0]


def advance(state: StageState, event: StageEvent) -> tuple[StageState, tuple[StageEffect, ...]]:
    """One transition. Raises ProtocolViolation or LeaseExceeded; the state is then to be thrown away."""
    match event:
        case WindowReceived():
            return _receive(state, event), ()
        case StepStarted():
            return replace(state, computing=True), ()
        case StepDone():
            return _computed(state, event)
        case CreditReceived():
            return _flush(replace(state, sender=state.sender.refill(event.bytes)))
        case OwnerAttached():
            return replace(state, owner_attached=True, held_answers=()), tuple(map(Reply, state.held_answers))


def _receive(state: StageState, event: WindowReceived) -> StageState:
    window, payload = event.window, event.payload
    if window.epoch != state.epoch:
        raise ProtocolViolation(f"a window of epoch {window.epoch} came on an edge of epoch {state.epoch}")
    size = len(payload)
    if size != window.rows * state.row_bytes:
        raise ProtocolViolation(
            f"a window of {window.rows} rows carries {size} bytes, expected {window.rows * state.row_bytes}"
        )
    if window.rows > MAX_WINDOW_ROWS:
        raise ProtocolViolation(f"a window has {window.rows} rows, at most {MAX_WINDOW_ROWS} are allowed")
    if window.rows > state.lease_tokens:
        raise LeaseExceeded(f"a window of {window.rows} rows is larger than the lease of {state.lease_tokens} tokens")
    if sum(span.count for span in window.want) > window.rows:
        raise ProtocolViolation("a window wants more answers than it has rows")
    tree, dead = state.tree.add(window.runs)
    if tree.tokens > state.lease_tokens:
        raise LeaseExceeded(
            f"{tree.tokens} tokens would be in use, the lease is {state.lease_tokens}",
            hint="open the session with a larger lease: prompt + max_tokens + slots in flight",
        )
    new_slots = [slot for run in window.runs for slot, _ in run.pairs()]
    if not set(new_slots).issuperset(slot for span in window.want for slot in span):
        raise ProtocolViolation("a window wants answers for slots that it does not carry")
    if window.commit is not None:
        if window.commit.stop > state.lease_tokens:
            raise ProtocolViolation(
                f"a commit up to position {window.commit.stop} is outside the lease of {state.lease_tokens}"
            )
        tree, died = tree.commit(window.commit)
        dead = dead | died
    if len(tree.alive) > MAX_ALIVE_SLOTS:
        raise ProtocolViolation(f"{len(tree.alive)} slots are not committed, at most {MAX_ALIVE_SLOTS} are allowed")
    receiver = state.receiver.receive(size)
    wants_answer = bool(window.want)
    if not dead.isdisjoint(new_slots):
        window, payload = _without(window, payload, dead, state.row_bytes)
    pending = PendingWindow(window, payload, size, tree.committed_tokens, wants_answer)
    return replace(state, tree=tree, receiver=receiver, queue=(*state.queue, pending))


def _without(window: Window, payload: Payload, dead: frozenset[int], row_bytes: int) -> tuple[Window, bytes]:
    """The window without its dead slots (rule 1): even with none left it travels on as a header."""
    pairs = [pair for run in window.runs for pair in run.pairs()]
    kept = [row for row, (slot, _) in enumerate(pairs) if slot not in dead]
    runs: list[SlotRun] = []
    for row in kept:
        slot, parent = pairs[row]
        last = runs[-1] if runs else None
        if last is not None and last.first + last.count == slot and parent == slot - 1:
            runs[-1] = SlotRun(last.first, last.count + 1, last.parent)
        else:
            runs.append(SlotRun(slot, 1, parent))
    want = spans_of(slot for span in window.want for slot in span if slot not in dead)
    rows = b"".join(bytes(payload[row * row_bytes : (row + 1) * row_bytes]) for row in kept)
    return Window(window.epoch, tuple(runs), want, window.commit), rows


def _computed(state: StageState, event: StepDone) -> tuple[StageState, tuple[StageEffect, ...]]:
    pending, *rest = state.queue
    receiver, returned = state.receiver.computed(pending.received_bytes)
    state = replace(state, queue=tuple(rest), computing=False, receiver=receiver)
    effects: tuple[StageEffect, ...] = (ReturnCredit(returned),) if returned else ()
    if not state.is_tail:
        state = replace(state, outbox=(*state.outbox, Forward(pending.window, event.rows or b"")))
        state, sent = _flush(state)
        return state, (*sent, *effects)
    if not pending.wants_answer:
        return state, effects  # a prompt chunk: nobody waits for its acknowledgement
    answer = Answer(
        slots=pending.window.want,
        tokens=event.tokens,
        committed_tokens=pending.committed_tokens,
        queue_rows=event.queue_rows,
        stage_ms=event.step_ms,
    )
    if state.owner_attached:
        return state, (Reply(answer), *effects)
    return replace(state, held_answers=(*state.held_answers, answer)), effects


def _flush(state: StageState) -> tuple[StageState, tuple[StageEffect, ...]]:
    """Everything in the outbox that the successor's credit allows, in order."""
    sent: list[Forward] = []
    sender = state.sender
    while len(sent) < len(state.outbox) and sender.may_send:
        forward = state.outbox[len(sent)]
        sender = sender.spend(len(forward.payload))
        sent.append(forward)
    return replace(state, outbox=state.outbox[len(sent) :], sender=sender), tuple(sent)

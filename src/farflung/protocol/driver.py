"""The driver's side of one generation, as a state machine: prompt chunks, then one token per traversal of the ring.

    (DriverState, event) -> (DriverState, effects)

Plain decode: the answer for the newest slot is itself the next token, so it goes out at once, committed by its own window.
The driver is the predecessor of the first stage: when the line to it breaks, what the stage lacks goes out again, made anew
from the token ids. An answer may come twice, and is taken once.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct, field
from msgspec.structs import replace

from farflung.core.errors import FarflungError, PromptTooLong, ProtocolViolation, UsageError
from farflung.core.ids import NodeId
from farflung.core.messages import Answer, StageTime, Window
from farflung.core.model import ModelSpec
from farflung.core.route import FIRST_EPOCH
from farflung.core.sampling import TokenLogprob
from farflung.core.tree import TokenTree
from farflung.core.window import Commit, SlotRun, SlotSpan, spans_of
from farflung.protocol import outgoing
from farflung.protocol.credit import SlotCredit
from farflung.protocol.events import CreditReceived, HaveReceived, SuccessorLost, SuccessorUp
from farflung.protocol.limits import MAX_TOLD_SPANS, MAX_WINDOW_ROWS
from farflung.protocol.outgoing import EdgeStatus, OutEdge
from farflung.protocol.stage_state import ID_BYTES
from farflung.protocol.windows import Given, slots_of


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What is to be generated.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: the most tokens to generate.
        vocab_size: token ids lie below it; a tail that answers with another is at fault.
        end_tokens: ids that end the text (they are not part of it).
        chunk_tokens: prompt tokens per window.
        timeline_every: of so many tokens the window of one is timed at every stage; 0: none.
        tells_ids: the tail must know the tokens, because a sampling option looks back at the text.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    vocab_size: int
    end_tokens: frozenset[int] = frozenset()
    chunk_tokens: int = 128
    timeline_every: int = 16
    tells_ids: bool = False

    @property
    def lease_tokens(self) -> int:
        """KV that every stage must reserve: all tokens but the last, which is never sent, and one slot in flight."""
        return len(self.prompt) + self.max_tokens


def plan_generation(plan: GenerationPlan, spec: ModelSpec) -> GenerationPlan:
    """The plan, if the model can carry it. Raises UsageError, PromptTooLong."""
    if not plan.prompt:
        raise UsageError("the prompt is empty", hint="give at least one token")
    if plan.max_tokens < 1:
        raise UsageError(f"max_tokens is {plan.max_tokens}", hint="ask for at least one token")
    bad = next((token for token in plan.prompt if not 0 <= token < plan.vocab_size), None)
    if bad is not None:
        raise UsageError(f"token id {bad} is outside the vocabulary of {plan.vocab_size}")
    if not 1 <= plan.chunk_tokens <= MAX_WINDOW_ROWS:
        raise UsageError(f"chunk_tokens is {plan.chunk_tokens}", hint=f"prompt chunks have 1 to {MAX_WINDOW_ROWS} tokens")
    if plan.lease_tokens > spec.context_tokens:
        raise PromptTooLong(
            f"{len(plan.prompt)} prompt tokens and {plan.max_tokens} more do not fit the {spec.context_tokens} of {spec.name}",
            hint=f"shorten the prompt or ask for at most {max(0, spec.context_tokens - len(plan.prompt))} tokens",
        )
    return plan


@dataclass(frozen=True)
class AnswerReceived:
    """From the tail."""

    answer: Answer


@dataclass(frozen=True)
class GrantReceived:
    """From a stage, when this driver's line to it is up (again): so many slots may be in flight."""

    node_id: NodeId
    slots: int
    is_tail: bool = False


@dataclass(frozen=True)
class Failed:
    """A stage reported a fault, or cannot be reached any more. ``node_id`` names the stage at fault, where one is."""

    error: FarflungError
    node_id: NodeId | None = None


@dataclass(frozen=True)
class Stop:
    """The caller has enough: a stop string, a cancellation."""

    reason: str


@dataclass(frozen=True)
class SendWindow:
    """To the first stage."""

    window: Window
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class TellIds:
    """To the tail: the tokens of slots."""

    slots: tuple[SlotSpan, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Emit:
    """One more token of the text."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Timed:
    """What became of one window at every stage."""

    timeline: tuple[StageTime, ...]


@dataclass(frozen=True)
class Finish:
    """The generation is over: close the session everywhere. ``reason``: ``stop``, ``length``, ``cancelled`` or ``error``."""

    reason: str
    error: FarflungError | None = None
    node_id: NodeId | None = None


DriverEvent = SuccessorUp | SuccessorLost | HaveReceived | CreditReceived | GrantReceived | AnswerReceived | Failed | Stop
"""The successor is the first stage."""

DriverEffect = SendWindow | TellIds | Emit | Timed | Finish


class DriverState(Struct, frozen=True, kw_only=True):
    """One generation.

    Attributes:
        plan: see above.
        tree: slots handed out; all committed in plain decode.
        token_ids: by slot.
        out: the edge to the first stage.
        slots: how many slots may be in flight.
        covered: every slot below has come through the ring.
        tail_listens: the session is open at the tail.
        generated: tokens emitted so far.
        waiting: the slot whose answer is wanted, None during prefill.
        is_timed: its window was to be timed.
        finished: why it ended, or None.
    """

    plan: GenerationPlan
    tree: TokenTree = field(default_factory=TokenTree)
    token_ids: tuple[int, ...] = ()
    out: OutEdge = field(default_factory=lambda: OutEdge(epoch=FIRST_EPOCH, row_bytes=ID_BYTES))
    slots: SlotCredit = field(default_factory=SlotCredit)
    covered: int = 0
    tail_listens: bool = False
    generated: int = 0
    waiting: int | None = None
    is_timed: bool = False
    finished: str | None = None

    @property
    def prefilling(self) -> bool:
        return self.tree.committed_tokens < len(self.plan.prompt)


Transition = tuple[DriverState, tuple[DriverEffect, ...]]


def advance(state: DriverState, event: DriverEvent) -> Transition:
    """One transition. After the end nothing has an effect. Raises ProtocolViolation for an answer nobody asked for."""
    if state.finished is not None:
        return state, ()
    match event:
        case AnswerReceived():
            return _accept(state, event.answer)
        case GrantReceived():
            return _granted(state, event)
        case Failed():
            return replace(state, finished="error"), (Finish("error", event.error, event.node_id),)
        case Stop():
            return replace(state, finished=event.reason), (Finish(event.reason),)
        case _:
            return _prefill(replace(state, out=_first_stage(state, event)))


def _granted(state: DriverState, event: GrantReceived) -> Transition:
    state = replace(state, slots=state.slots.grant(event.node_id, event.slots))
    if not (event.is_tail and state.plan.tells_ids):
        return state, ()
    # It may be another tail, or one that was restarted: it needs them all.
    told = (*state.tree.committed, *spans_of(state.tree.alive))
    return replace(state, tail_listens=True), _told(state, told)


def _told(state: DriverState, spans: tuple[SlotSpan, ...]) -> tuple[DriverEffect, ...]:
    """In messages of bounded size."""
    parts = [spans[start : start + MAX_TOLD_SPANS] for start in range(0, len(spans), MAX_TOLD_SPANS)]
    return tuple(TellIds(part, tuple(state.token_ids[slot] for span in part for slot in span)) for part in parts)


def _first_stage(state: DriverState, event: SuccessorUp | SuccessorLost | HaveReceived | CreditReceived) -> OutEdge:
    wanted = frozenset() if state.waiting is None else frozenset({state.waiting})
    given = Given(state.tree, state.tree, wanted)
    match event:
        case SuccessorUp(begins=True):
            return outgoing.begin(state.out, given)
        case SuccessorUp():
            return outgoing.ask(state.out)
        case SuccessorLost():
            return outgoing.lost(state.out)
        case HaveReceived():
            if event.have.committed_tokens > state.tree.committed_tokens:
                raise ProtocolViolation(
                    f"the first stage holds {event.have.committed_tokens} committed tokens, of {state.tree.committed_tokens}"
                )
            return outgoing.resume(state.out, event.have, given)
        case CreditReceived():
            return outgoing.refill(state.out, event.bytes)


def _prefill(state: DriverState) -> Transition:
    """What waits, then prompt chunks, as many as the credit allows; the last row of the last one wants an answer."""
    state, sent = _flushed(state)
    prompt = state.plan.prompt
    while state.prefilling and state.out.status is EdgeStatus.UP and not state.out.waiting and state.out.credit.may_send:
        start = state.tree.committed_tokens
        chunk = prompt[start : start + state.plan.chunk_tokens]
        state, more = _send(state, chunk, want_last=start + len(chunk) == len(prompt))
        sent += more
    return state, sent


def _accept(state: DriverState, answer: Answer) -> Transition:
    count = sum(span.count for span in answer.slots)  # before they are listed: spans are short, what they name may be long
    if count != len(answer.tokens) or len(answer.logprobs) not in (0, count):
        raise ProtocolViolation(
            f"the tail answered {count} slots with {len(answer.tokens)} tokens, {len(answer.logprobs)} log-probabilities"
        )
    slots = [slot for span in answer.slots for slot in span]
    if answer.next_slot > state.tree.next_slot or any(slot >= state.tree.next_slot for slot in slots):
        raise ProtocolViolation(f"the tail answered for slots from {state.tree.next_slot} on, which were never sent")
    state = replace(state, covered=max(state.covered, answer.next_slot))
    timed: tuple[DriverEffect, ...] = ()
    if answer.timeline is not None and state.is_timed and state.waiting in slots:
        timed = (Timed(answer.timeline),)
    if state.waiting is None or state.waiting not in slots:
        return state, timed  # an acknowledgement, or an answer that came before and was kept until now
    place = slots.index(state.waiting)
    token, logprob = answer.tokens[place], answer.logprobs[place] if answer.logprobs else None
    if not 0 <= token < state.plan.vocab_size:
        raise ProtocolViolation(f"the tail answered with token id {token}, outside the vocabulary of {state.plan.vocab_size}")
    if token in state.plan.end_tokens:
        return replace(state, finished="stop"), (*timed, Finish("stop"))
    state = replace(state, generated=state.generated + 1)
    if state.generated == state.plan.max_tokens:
        return replace(state, finished="length"), (*timed, Emit(token, logprob), Finish("length"))
    state, sent = _send(state, (token,), want_last=True)
    # The window goes out before the token is shown: the ring's time is the scarce one.
    return state, (*sent, *timed, Emit(token, logprob))


def _send(state: DriverState, token_ids: tuple[int, ...], *, want_last: bool) -> Transition:
    """The next slots as a path under the root, committed by the window itself."""
    tree, count = state.tree, len(token_ids)
    first = tree.next_slot
    run = SlotRun(first, count, tree.root)
    commit = Commit(tree.committed_tokens, (SlotSpan(first, count),))
    last = first + count - 1
    every = state.plan.timeline_every
    timed = every > 0 and want_last and state.generated % every == 0
    window = Window(
        epoch=state.out.epoch,
        runs=(run,),
        want=(SlotSpan(last, 1),) if want_last else (),
        commit=commit,
        next_slot=first + count,
        timeline=() if timed else None,
    )
    tree, _ = tree.add((run,))
    tree, _ = tree.commit(commit)
    state = replace(
        state,
        tree=tree,
        token_ids=state.token_ids + token_ids,
        out=outgoing.push(state.out, window, tree),
        waiting=last if want_last else None,
        is_timed=timed,
    )
    told = _told(state, (SlotSpan(first, count),)) if state.tail_listens else ()
    state, sent = _flushed(state)
    return state, (*sent, *told)


def _flushed(state: DriverState) -> Transition:
    out, windows = outgoing.flush(state.out, state.tree)
    ids = state.token_ids
    return replace(state, out=out), tuple(
        SendWindow(window, tuple(ids[slot] for slot in slots_of(window))) for window in windows
    )

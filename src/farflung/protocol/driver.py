"""The driver's side of one generation, as a state machine: prompt chunks, then one token per traversal of the ring.

    (DriverState, event) -> (DriverState, effects)

Plain decode: the answer for the newest slot is itself the next token, so it goes out at once, committed by its own window.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct, field
from msgspec.structs import replace

from farflung.core.errors import FarflungError, PromptTooLong, ProtocolViolation, UsageError
from farflung.core.ids import NodeId
from farflung.core.messages import Answer, Window
from farflung.core.model import ModelSpec
from farflung.core.tree import TokenTree
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.protocol.credit import SenderCredit
from farflung.protocol.limits import MAX_WINDOW_ROWS

FIRST_EPOCH = 1
TOKEN_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What is to be generated.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: the most tokens to generate.
        vocab_size: token ids lie below it; a tail that answers with another is at fault.
        end_tokens: ids that end the text (they are not part of it).
        chunk_tokens: prompt tokens per window.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    vocab_size: int
    end_tokens: frozenset[int] = frozenset()
    chunk_tokens: int = 128

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
class Begin:
    """The line to the first stage is up."""


@dataclass(frozen=True)
class AnswerReceived:
    """From the tail."""

    answer: Answer


@dataclass(frozen=True)
class CreditReceived:
    """From the first stage."""

    bytes: int


@dataclass(frozen=True)
class Failed:
    """A stage reported a fault, or its link is gone. ``node_id`` names the stage at fault, where one is."""

    error: FarflungError
    node_id: NodeId | None = None


@dataclass(frozen=True)
class Stop:
    """The caller has enough: a stop string, a cancellation."""

    reason: str


@dataclass(frozen=True)
class SendWindow:
    """To the first stage; ``opens``: the session's opening rides with it."""

    window: Window
    token_ids: tuple[int, ...]
    opens: bool = False


@dataclass(frozen=True)
class Emit:
    """One more token of the text."""

    token: int


@dataclass(frozen=True)
class Finish:
    """The generation is over: close the session everywhere. ``reason``: ``stop``, ``length``, ``cancelled`` or ``error``."""

    reason: str
    error: FarflungError | None = None
    node_id: NodeId | None = None


DriverEvent = Begin | AnswerReceived | CreditReceived | Failed | Stop
DriverEffect = SendWindow | Emit | Finish


class DriverState(Struct, frozen=True, kw_only=True):
    """One generation.

    Attributes:
        plan: see above.
        tree: slots handed out; all committed in plain decode.
        generated: tokens emitted so far.
        credit: what the first stage still takes.
        waiting: the slot whose answer is wanted, None during prefill.
        finished: why it ended, or None.
    """

    plan: GenerationPlan
    tree: TokenTree = field(default_factory=TokenTree)
    generated: int = 0
    credit: SenderCredit = field(default_factory=SenderCredit)
    waiting: int | None = None
    finished: str | None = None

    @property
    def prefilling(self) -> bool:
        return self.tree.committed_tokens < len(self.plan.prompt)


def advance(state: DriverState, event: DriverEvent) -> tuple[DriverState, tuple[DriverEffect, ...]]:
    """One transition. After the end nothing has an effect. Raises ProtocolViolation for an answer nobody asked for."""
    if state.finished is not None:
        return state, ()
    match event:
        case Begin():
            return _prefill(state)
        case CreditReceived():
            return _prefill(replace(state, credit=state.credit.refill(event.bytes)))
        case AnswerReceived():
            return _accept(state, event.answer)
        case Failed():
            return replace(state, finished="error"), (Finish("error", event.error, event.node_id),)
        case Stop():
            return replace(state, finished=event.reason), (Finish(event.reason),)


def _prefill(state: DriverState) -> tuple[DriverState, tuple[DriverEffect, ...]]:
    """Prompt chunks, as many as the credit allows; the last row of the last one wants an answer."""
    sent: list[DriverEffect] = []
    prompt = state.plan.prompt
    while state.prefilling and state.credit.may_send:
        start = state.tree.committed_tokens
        chunk = prompt[start : start + state.plan.chunk_tokens]
        last = start + len(chunk) == len(prompt)
        state, window = _window(state, len(chunk), want_last=last)
        sent.append(SendWindow(window, chunk, opens=start == 0))
    return state, tuple(sent)


def _accept(state: DriverState, answer: Answer) -> tuple[DriverState, tuple[DriverEffect, ...]]:
    if sum(span.count for span in answer.slots) > len(answer.tokens):
        raise ProtocolViolation(f"the tail answered with {len(answer.tokens)} tokens for more slots than that")
    slots = [slot for span in answer.slots for slot in span]
    if not slots and not answer.tokens:
        return state, ()  # an acknowledgement alone
    if state.waiting is None or slots != [state.waiting] or len(answer.tokens) != 1:
        raise ProtocolViolation(
            f"the tail answered slots {slots[:8]} with {len(answer.tokens)} tokens; wanted: slot {state.waiting}"
        )
    token = answer.tokens[0]
    if not 0 <= token < state.plan.vocab_size:
        raise ProtocolViolation(f"the tail answered with token id {token}, outside the vocabulary of {state.plan.vocab_size}")
    if token in state.plan.end_tokens:
        return replace(state, finished="stop"), (Finish("stop"),)
    state = replace(state, generated=state.generated + 1)
    if state.generated == state.plan.max_tokens:
        return replace(state, finished="length"), (Emit(token), Finish("length"))
    state, window = _window(state, 1, want_last=True)
    # The window goes out before the token is shown: the ring's time is the scarce one.
    return state, (SendWindow(window, (token,)), Emit(token))


def _window(state: DriverState, count: int, *, want_last: bool) -> tuple[DriverState, Window]:
    """The next ``count`` slots as a path under the root, committed by the window itself."""
    tree = state.tree
    first = tree.next_slot
    run = SlotRun(first, count, tree.root)
    commit = Commit(tree.committed_tokens, (SlotSpan(first, count),))
    last = first + count - 1
    window = Window(FIRST_EPOCH, (run,), (SlotSpan(last, 1),) if want_last else (), commit)
    tree, _ = tree.add((run,))
    tree, _ = tree.commit(commit)
    state = replace(state, tree=tree, credit=state.credit.spend(count * TOKEN_BYTES), waiting=last if want_last else None)
    return state, window

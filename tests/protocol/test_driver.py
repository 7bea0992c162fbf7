"""The driver's machine: prompt chunks, one token per answer, broken lines to the first stage, and every way to end."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from farflung.core.errors import PromptTooLong, ProtocolViolation, StageLost, UsageError
from farflung.core.ids import ModelDigest, NodeId
from farflung.core.messages import Answer, Have, StageTime
from farflung.core.model import ModelSpec
from farflung.core.sampling import TokenLogprob
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.protocol.credit import INITIAL_CREDIT_BYTES, INITIAL_SLOTS, SlotCredit
from farflung.protocol.driver import (
    AnswerReceived,
    DriverEffect,
    DriverEvent,
    DriverState,
    Emit,
    Failed,
    Finish,
    GenerationPlan,
    GrantReceived,
    SendWindow,
    Stop,
    TellIds,
    Timed,
    advance,
    plan_generation,
)
from farflung.protocol.events import CreditReceived, HaveReceived, SuccessorLost, SuccessorUp
from farflung.protocol.limits import MAX_WINDOW_ROWS

SPEC = ModelSpec(
    name="m", family="llama", digest=ModelDigest("0" * 64), layers=4, hidden_size=8, vocab_size=100, context_tokens=32
)
EOS = 9


NODES = [NodeId(digit * 64) for digit in "abc"]


def run(state: DriverState, *events: DriverEvent) -> tuple[DriverState, list[DriverEffect]]:
    seen: list[DriverEffect] = []
    for event in events:
        state, effects = advance(state, event)
        seen.extend(effects)
    return state, seen


def sent(effects: list[DriverEffect]) -> list[SendWindow]:
    return [effect for effect in effects if isinstance(effect, SendWindow)]


def begun(
    prompt: int = 5, max_tokens: int = 3, chunk: int = 2, timeline_every: int = 0
) -> tuple[DriverState, list[SendWindow]]:
    plan = GenerationPlan(
        prompt=tuple(i % 90 for i in range(prompt)),
        max_tokens=max_tokens,
        vocab_size=100,
        end_tokens=frozenset({EOS}),
        chunk_tokens=chunk,
        timeline_every=timeline_every,
    )
    state, effects = run(DriverState(plan=plan), SuccessorUp(begins=True))
    return state, sent(effects)


def answer(state: DriverState, token: int, logprobs: tuple[TokenLogprob, ...] = ()) -> AnswerReceived:
    assert state.waiting is not None
    return AnswerReceived(Answer((SlotSpan(state.waiting, 1),), (token,), 0, state.waiting + 1, logprobs=logprobs))


def test_the_prompt_goes_out_in_committed_chunks_and_only_its_last_row_wants_an_answer() -> None:
    _, windows = begun(prompt=5, chunk=2)
    assert [effect.token_ids for effect in windows] == [(0, 1), (2, 3), (4,)]
    assert [effect.window.runs for effect in windows] == [(SlotRun(0, 2, -1),), (SlotRun(2, 2, 1),), (SlotRun(4, 1, 3),)]
    assert [effect.window.commit for effect in windows] == [
        Commit(0, (SlotSpan(0, 2),)),
        Commit(2, (SlotSpan(2, 2),)),
        Commit(4, (SlotSpan(4, 1),)),
    ]
    assert [effect.window.want for effect in windows] == [(), (), (SlotSpan(4, 1),)]
    assert [effect.window.next_slot for effect in windows] == [2, 4, 5]


def test_each_answer_is_sent_on_as_the_next_token_before_it_is_shown() -> None:
    state, _ = begun()
    logprob = TokenLogprob(-0.5, ())
    state, effects = run(state, answer(state, 42, (logprob,)))
    window, emit = effects
    assert isinstance(window, SendWindow)
    assert window.token_ids == (42,)
    assert window.window.is_decode
    assert window.window.commit == Commit(5, (SlotSpan(5, 1),))
    assert emit == Emit(42, logprob)


def test_an_answer_that_comes_again_is_taken_once() -> None:
    state, _ = begun()
    first = answer(state, 42)
    state, _ = run(state, first)
    assert run(state, first) == (state, [])


def test_it_ends_by_length_without_sending_the_last_token() -> None:
    state, _ = begun(max_tokens=2)
    state, _ = run(state, answer(state, 1))
    state, effects = run(state, answer(state, 2))
    assert effects == [Emit(2), Finish("length")]
    assert state.tree.tokens <= state.plan.lease_tokens


def test_an_end_token_ends_it_and_is_not_text() -> None:
    state, _ = begun()
    _, effects = run(state, answer(state, EOS))
    assert effects == [Finish("stop")]


def test_after_the_end_nothing_has_an_effect() -> None:
    state, _ = begun()
    state, effects = run(state, Stop("cancelled"))
    assert effects == [Finish("cancelled")]
    late: list[DriverEvent] = [
        Stop("again"),
        Failed(StageLost("gone")),
        AnswerReceived(Answer((), (), 0)),
        CreditReceived(1),
        GrantReceived(NODES[0], 1),
        HaveReceived(Have(7, 0, (), 0)),
        SuccessorLost(),
    ]
    assert run(state, *late) == (state, [])


def test_a_failure_ends_it_with_its_error_and_the_node_at_fault() -> None:
    state, _ = begun()
    error, node_id = StageLost("gone"), NodeId("a" * 64)
    _, effects = run(state, Failed(error, node_id))
    assert effects == [Finish("error", error, node_id)]


def test_some_windows_are_timed_and_their_timelines_come_out() -> None:
    state, windows = begun(timeline_every=2, max_tokens=9)
    timed = [windows[-1].window.timeline]
    for token in (1, 2, 3):
        state, effects = run(state, answer(state, token))
        timed.append(sent(effects)[0].window.timeline)
    assert timed == [(), None, (), None]
    timeline = (StageTime(1.0, 2.0, 3.0, 1),)
    unasked = replace(answer(state, 4).answer, timeline=timeline)
    _, effects = run(state, AnswerReceived(unasked))
    assert Timed(timeline) not in effects
    state, _ = run(state, answer(state, 4))
    _, effects = run(state, AnswerReceived(replace(answer(state, 5).answer, timeline=timeline)))
    assert Timed(timeline) in effects


@pytest.mark.parametrize(
    "bad",
    [
        Answer((SlotSpan(4, 2),), (1, 2), 0),
        Answer((SlotSpan(4, 1),), (1, 2), 0),
        Answer((SlotSpan(0, 2**30),), (1,), 0),
        Answer((SlotSpan(4, 1),), (100,), 5),
        Answer((SlotSpan(4, 1),), (-1,), 5),
        Answer((), (), 0, next_slot=6),
        Answer((SlotSpan(4, 1),), (1,), 0, logprobs=(TokenLogprob(-0.5, ()),) * 2),
    ],
    ids=["slot", "count", "huge", "vocabulary", "negative", "next slot", "logprobs"],
)
def test_an_answer_nobody_asked_for_is_a_violation(bad: Answer) -> None:
    state, _ = begun()
    with pytest.raises(ProtocolViolation):
        run(state, AnswerReceived(bad))


def test_an_answer_without_slots_is_a_mere_acknowledgement() -> None:
    state, _ = begun()
    state, effects = run(state, AnswerReceived(Answer((), (), 3, 4)))
    assert (effects, state.covered) == ([], 4)


def test_the_least_of_the_stages_grants_bounds_what_is_in_flight() -> None:
    state, _ = begun()
    assert state.slots.granted == INITIAL_SLOTS
    state = replace(state, slots=SlotCredit(stages=3))
    state, _ = run(state, GrantReceived(NODES[0], 1024), GrantReceived(NODES[1], 100), GrantReceived(NODES[0], 1024))
    assert state.slots.granted == INITIAL_SLOTS, "the third may grant less"
    state, _ = run(state, GrantReceived(NODES[2], 1024))
    assert state.slots.granted == 100
    with pytest.raises(ProtocolViolation):
        run(state, GrantReceived(NODES[0], 0))


def test_the_tail_is_told_every_token_once_it_listens_and_again_when_it_comes_anew() -> None:
    plan = GenerationPlan(prompt=(10, 11, 12), max_tokens=5, vocab_size=100, tells_ids=True)
    state, effects = run(DriverState(plan=plan), SuccessorUp(begins=True), GrantReceived(NODES[0], 64))
    assert not [effect for effect in effects if isinstance(effect, TellIds)]
    state, effects = run(state, GrantReceived(NODES[2], 64, is_tail=True))
    assert effects == [TellIds((SlotSpan(0, 3),), (10, 11, 12))]
    state, effects = run(state, answer(state, 42))
    assert TellIds((SlotSpan(3, 1),), (42,)) in effects
    state, effects = run(state, GrantReceived(NODES[2], 64, is_tail=True))
    assert effects == [TellIds((SlotSpan(0, 4),), (10, 11, 12, 42))]


def test_a_prompt_beyond_the_first_stages_credit_waits_for_more() -> None:
    tokens = INITIAL_CREDIT_BYTES // 4 + 10  # four bytes a token: a little more than the grant
    state, windows = begun(prompt=tokens, chunk=tokens // 3)
    assert state.prefilling
    assert sum(len(effect.token_ids) for effect in windows) < tokens
    state, effects = run(state, CreditReceived(INITIAL_CREDIT_BYTES // 2))
    assert sent(effects)
    assert not state.prefilling


def test_nothing_is_sent_before_the_first_stage_is_up() -> None:
    plan = GenerationPlan(prompt=(1, 2), max_tokens=1, vocab_size=10)
    assert run(DriverState(plan=plan), SuccessorLost(), SuccessorUp(begins=False))[1] == []


def test_after_a_broken_line_what_the_first_stage_lacks_goes_out_again_and_then_the_rest_of_the_prompt() -> None:
    plan = GenerationPlan(prompt=(10, 11, 12, 13, 14), max_tokens=3, vocab_size=100, chunk_tokens=INITIAL_CREDIT_BYTES)
    state, _ = run(DriverState(plan=plan), SuccessorUp(begins=True))
    state, effects = run(state, SuccessorLost(), SuccessorUp(begins=False))
    assert effects == []
    state, effects = run(state, HaveReceived(Have(1, 2, (), INITIAL_CREDIT_BYTES)))
    (again,) = sent(effects)
    assert again.token_ids == (12, 13, 14)
    assert again.window.commit == Commit(2, (SlotSpan(2, 3),))
    assert again.window.want == (SlotSpan(4, 1),)


def test_an_answer_that_comes_while_the_line_is_broken_is_shown_and_its_window_goes_out_later() -> None:
    state, _ = begun()
    state, effects = run(state, SuccessorLost(), answer(state, 42))
    assert effects == [Emit(42)]
    _, effects = run(state, SuccessorUp(begins=False), HaveReceived(Have(1, 5, (), INITIAL_CREDIT_BYTES)))
    (again,) = sent(effects)
    assert (again.token_ids, again.window.want, again.window.next_slot) == ((42,), (SlotSpan(5, 1),), 6)


def test_where_nothing_is_missing_a_header_still_tells_what_has_gone_out() -> None:
    state, _ = begun()
    _, effects = run(state, SuccessorLost(), SuccessorUp(begins=False), HaveReceived(Have(1, 5, (), INITIAL_CREDIT_BYTES)))
    (again,) = sent(effects)
    assert (again.token_ids, again.window.rows, again.window.next_slot) == ((), 0, 5)


def test_a_first_stage_that_claims_more_than_there_is_is_at_fault() -> None:
    state, _ = begun()
    with pytest.raises(ProtocolViolation, match="holds 6 committed tokens, of 5"):
        run(state, SuccessorLost(), SuccessorUp(begins=False), HaveReceived(Have(1, 6, (), INITIAL_CREDIT_BYTES)))


def test_a_prompt_that_does_not_fit_says_by_how_much() -> None:
    with pytest.raises(PromptTooLong, match="30 prompt tokens and 3 more do not fit the 32"):
        plan_generation(GenerationPlan(prompt=(1,) * 30, max_tokens=3, vocab_size=100), SPEC)


@pytest.mark.parametrize("chunk", [0, -1, MAX_WINDOW_ROWS + 1])
def test_prompt_chunks_must_fit_a_window(chunk: int) -> None:
    with pytest.raises(UsageError, match="chunk_tokens"):
        plan_generation(GenerationPlan(prompt=(1,), max_tokens=1, vocab_size=100, chunk_tokens=chunk), SPEC)


@pytest.mark.parametrize(("prompt", "max_tokens"), [((), 1), ((1,), 0), ((100,), 1), ((-1,), 1)])
def test_a_generation_that_cannot_be_right_is_refused(prompt: tuple[int, ...], max_tokens: int) -> None:
    with pytest.raises(UsageError):
        plan_generation(GenerationPlan(prompt=prompt, max_tokens=max_tokens, vocab_size=100), SPEC)

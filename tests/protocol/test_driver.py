"""The driver's machine: prompt chunks, one token per answer, and every way to end."""

import pytest

from farflung.core.errors import PromptTooLong, ProtocolViolation, StageLost, UsageError
from farflung.core.ids import ModelDigest
from farflung.core.messages import Answer
from farflung.core.model import ModelSpec
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.protocol.credit import INITIAL_CREDIT_BYTES
from farflung.protocol.driver import (
    AnswerReceived,
    Begin,
    CreditReceived,
    DriverState,
    Emit,
    Failed,
    Finish,
    GenerationPlan,
    SendWindow,
    Stop,
    advance,
    plan_generation,
)
from farflung.protocol.limits import MAX_WINDOW_ROWS

SPEC = ModelSpec(
    name="m", family="llama", digest=ModelDigest("0" * 64), layers=4, hidden_size=8, vocab_size=100, context_tokens=32
)
EOS = 9


def begun(prompt: int = 5, max_tokens: int = 3, chunk: int = 2) -> tuple[DriverState, list[SendWindow]]:
    plan = GenerationPlan(
        prompt=tuple(i % 90 for i in range(prompt)),
        max_tokens=max_tokens,
        vocab_size=100,
        end_tokens=frozenset({EOS}),
        chunk_tokens=chunk,
    )
    state, effects = advance(DriverState(plan=plan), Begin())
    return state, [effect for effect in effects if isinstance(effect, SendWindow)]


def answer(state: DriverState, token: int) -> AnswerReceived:
    assert state.waiting is not None
    return AnswerReceived(Answer((SlotSpan(state.waiting, 1),), (token,), state.waiting + 1))


def test_the_prompt_goes_out_in_committed_chunks_and_only_its_last_row_wants_an_answer() -> None:
    _, sent = begun(prompt=5, chunk=2)
    assert [effect.token_ids for effect in sent] == [(0, 1), (2, 3), (4,)]
    assert [effect.opens for effect in sent] == [True, False, False]
    assert [effect.window.runs for effect in sent] == [(SlotRun(0, 2, -1),), (SlotRun(2, 2, 1),), (SlotRun(4, 1, 3),)]
    assert [effect.window.commit for effect in sent] == [
        Commit(0, (SlotSpan(0, 2),)),
        Commit(2, (SlotSpan(2, 2),)),
        Commit(4, (SlotSpan(4, 1),)),
    ]
    assert [effect.window.want for effect in sent] == [(), (), (SlotSpan(4, 1),)]


def test_each_answer_is_sent_on_as_the_next_token_before_it_is_shown() -> None:
    state, _ = begun()
    state, effects = advance(state, answer(state, 42))
    window, emit = effects
    assert isinstance(window, SendWindow)
    assert window.token_ids == (42,)
    assert window.window.is_decode
    assert window.window.commit == Commit(5, (SlotSpan(5, 1),))
    assert emit == Emit(42)


def test_it_ends_by_length_without_sending_the_last_token() -> None:
    state, _ = begun(max_tokens=2)
    state, _ = advance(state, answer(state, 1))
    state, effects = advance(state, answer(state, 2))
    assert effects == (Emit(2), Finish("length"))
    assert state.tree.tokens <= state.plan.lease_tokens


def test_an_end_token_ends_it_and_is_not_text() -> None:
    state, _ = begun()
    state, effects = advance(state, answer(state, EOS))
    assert effects == (Finish("stop"),)


def test_after_the_end_nothing_has_an_effect() -> None:
    state, _ = begun()
    state, effects = advance(state, Stop("cancelled"))
    assert effects == (Finish("cancelled"),)
    for event in (Stop("again"), Failed(StageLost("gone")), AnswerReceived(Answer((), (), 0)), CreditReceived(1)):
        assert advance(state, event) == (state, ())


def test_a_failure_ends_it_with_its_error() -> None:
    state, _ = begun()
    error = StageLost("gone")
    _, effects = advance(state, Failed(error))
    assert effects == (Finish("error", error),)


@pytest.mark.parametrize(
    "bad",
    [
        Answer((SlotSpan(3, 1),), (1,), 0),
        Answer((SlotSpan(4, 2),), (1, 2), 0),
        Answer((SlotSpan(4, 1),), (1, 2), 0),
        Answer((SlotSpan(0, 2**30),), (1,), 0),
        Answer((SlotSpan(4, 1),), (100,), 5),
        Answer((SlotSpan(4, 1),), (-1,), 5),
    ],
)
def test_an_answer_nobody_asked_for_is_a_violation(bad: Answer) -> None:
    state, _ = begun()
    with pytest.raises(ProtocolViolation):
        advance(state, AnswerReceived(bad))


def test_an_answer_without_slots_is_a_mere_acknowledgement() -> None:
    state, _ = begun()
    assert advance(state, AnswerReceived(Answer((), (), 3))) == (state, ())


def test_a_prompt_beyond_the_first_stages_credit_waits_for_more() -> None:
    tokens = INITIAL_CREDIT_BYTES // 4 + 10  # four bytes a token: a little more than the grant
    state, sent = begun(prompt=tokens, chunk=tokens // 3)
    assert state.prefilling
    assert sum(len(effect.token_ids) for effect in sent) < tokens
    state, effects = advance(state, CreditReceived(INITIAL_CREDIT_BYTES // 2))
    assert effects
    assert not state.prefilling


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

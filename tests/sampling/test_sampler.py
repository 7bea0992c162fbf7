from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from plain_sampling import recount, token_after

from farflung.core.errors import StageFailed, UsageError
from farflung.core.sampling import SamplingOptions
from farflung.sampling import log_probabilities, sample_rows

SAMPLES = 20_000
TINY = np.array([2.0, 1.0, 0.5, 0.5, -1.0, -3.0], dtype=np.float32)
CHI_SQUARE_5 = 25.74  # exceeded once in 10,000 honest experiments of five degrees of freedom


def chi_square(tokens: list[int], probabilities: NDArray[np.float64]) -> float:
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0.0].sum() == 0
    expected = probabilities[probabilities > 0.0] * len(tokens)
    return float(((counts[probabilities > 0.0] - expected) ** 2 / expected).sum())


def softmax(row: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    weights = np.exp(row.astype(np.float64) / temperature)
    return np.asarray(weights / weights.sum())


def test_tokens_come_as_often_over_seeds_as_over_positions() -> None:
    tokens = [sample_rows(TINY[None], SamplingOptions(temperature=1.0, seed=seed), [5])[0] for seed in range(SAMPLES)]
    assert chi_square(tokens, softmax(TINY, 1.0)) < CHI_SQUARE_5


def test_the_token_that_reaches_top_p_exactly_is_the_last_one_kept() -> None:
    even = np.zeros((1, 4), dtype=np.float32)  # a quarter each, exactly
    for top_p, kept in ((0.25, {0}), (0.5, {0, 1}), (0.51, {0, 1, 2})):
        options = [SamplingOptions(temperature=1.0, top_p=top_p, seed=seed) for seed in range(200)]
        assert {sample_rows(even, option, [0])[0] for option in options} == kept


def rows_of(vocab: int) -> st.SearchStrategy[NDArray[np.float32]]:
    """Peaked, flat, level, tied, and partly forbidden logits."""

    def build(seed: int, spread: float, step: float, forbidden: float) -> NDArray[np.float32]:
        rng = np.random.default_rng(seed)
        row = rng.normal(0.0, spread, vocab)
        if step:
            row = np.round(row / step) * step
        row[rng.random(vocab) < forbidden] = -np.inf
        row[rng.integers(vocab)] = spread
        return row.astype(np.float32)

    return st.builds(
        build,
        st.integers(0, 2**32),
        st.sampled_from([0.0, 1e-3, 0.3, 3.0, 30.0, 3e4]),
        st.sampled_from([0.0, 0.5, 4.0]),
        st.sampled_from([0.0, 0.5, 0.999]),
    )


VOCAB = 4000
PROMPT, OUTPUT = [0, 7, 7, 3999, 1200], [7, 8, 8, 8, 2500]


def any_options() -> st.SearchStrategy[SamplingOptions]:
    bias = st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 0.0, 3.0, 100.0]), max_size=4)
    return st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.0, 1e-300, 1e-3, 0.3, 0.7, 1.0, 2.0, 100.0]),
        top_k=st.sampled_from([0, 0, 1, 2, 50, 3000, VOCAB, 10**6]),
        top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.95, 0.999999, 1.0, 1.0]),
        min_p=st.sampled_from([0.0, 0.0, 1e-9, 0.05, 0.9, 1.0]),
        repetition_penalty=st.sampled_from([0.5, 1.0, 1.0, 1.2]),
        presence_penalty=st.sampled_from([0.0, 0.0, 1.3, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -2.0]),
        logit_bias=bias.map(lambda found: tuple(found.items())),
        seed=st.integers(0, 2**64 - 1),
    )


@settings(deadline=None, max_examples=300)
@given(row=rows_of(VOCAB), options=any_options(), position=st.integers(0, 2**31))
def test_shortcuts_give_the_same_token_as_full_sorts_and_noise_for_every_token(
    row: NDArray[np.float32], options: SamplingOptions, position: int
) -> None:
    counts = recount(PROMPT, OUTPUT)
    with np.errstate(over="ignore"):
        expected = token_after(row, options, position, PROMPT, OUTPUT)
    assert sample_rows(row[None], options, [position], [counts]) == [expected]


def test_a_token_far_below_the_head_wins_when_its_noise_demands_it() -> None:
    """A head of one token, and a tail so wide that some of it outbids the head about half the time."""
    row = np.full(60_000, -11.0, dtype=np.float32)
    row[0] = 0.0
    options = SamplingOptions(temperature=1.0, seed=4)
    tokens = sample_rows(np.broadcast_to(row, (60, len(row))), options, range(60))
    assert tokens == [token_after(row, options, position) for position in range(60)]
    assert 5 < sum(token != 0 for token in tokens) < 55


def test_greedy_takes_the_greatest_logit_and_the_lowest_id_among_equals() -> None:
    rows = np.array([[1, 3, 3, 2], [5, 5, 5, 5], [-np.inf, -np.inf, -np.inf, -9]], dtype=np.float32)
    assert sample_rows(rows, SamplingOptions(), [0, 1, 2]) == [1, 0, 3]


def test_equal_scores_go_to_the_lowest_id() -> None:
    """At logits of 1e30 the noise vanishes in the rounding, so all scores tie; a temperature next to 0 is greedy."""
    row = np.array([[0.0, 1e30, 1e30, 1.0]], dtype=np.float32)
    assert sample_rows(row, SamplingOptions(temperature=5e-324, top_p=0.4), [0]) == [1]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**64 - 1), data=st.data())
def test_a_token_does_not_depend_on_the_rows_beside_it(seed: int, data: st.DataObject) -> None:
    rows = np.random.default_rng(seed).normal(0.0, 2.0, (6, 1500)).astype(np.float32)
    positions = data.draw(st.lists(st.integers(0, 2**20), min_size=6, max_size=6))
    options = SamplingOptions(temperature=0.9, top_p=data.draw(st.sampled_from([0.9, 1.0])), seed=seed)
    together = sample_rows(rows, options, positions)
    order = data.draw(st.permutations(range(6)))
    assert sample_rows(rows[order], options, [positions[i] for i in order]) == [together[i] for i in order]
    assert [sample_rows(rows[i : i + 1], options, [positions[i]])[0] for i in range(6)] == together


def test_seed_choice_and_position_each_change_the_tokens() -> None:
    rows = np.zeros((64, 500), dtype=np.float32)
    base = sample_rows(rows, SamplingOptions(temperature=1.0, seed=1), range(64))
    assert sample_rows(rows, SamplingOptions(temperature=1.0, seed=1), range(64)) == base
    assert sample_rows(rows, SamplingOptions(temperature=1.0, seed=2), range(64)) != base
    assert sample_rows(rows, SamplingOptions(temperature=1.0, seed=1, choice=1), range(64)) != base
    assert sample_rows(rows, SamplingOptions(temperature=1.0, seed=1), range(1, 65)) != base


@pytest.mark.parametrize(
    "options", [SamplingOptions(), SamplingOptions(temperature=1.0), SamplingOptions(temperature=1.0, top_p=0.9)]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_refused_by_its_number(options: SamplingOptions, bad: float) -> None:
    rows = np.zeros((3, 2000), dtype=np.float32)
    rows[1, 1234] = bad
    with pytest.raises(StageFailed, match=r"row 1 \(position 8\)"):
        sample_rows(rows, options, [7, 8, 9])


def test_a_row_that_forbids_every_token_is_refused() -> None:
    with pytest.raises(StageFailed, match="row 0"):
        sample_rows(np.full((1, 10), -np.inf, dtype=np.float32), SamplingOptions(temperature=1.0), [0])


def test_no_rows_give_no_tokens() -> None:
    assert sample_rows(np.zeros((0, 10), dtype=np.float32), SamplingOptions(), []) == []


def test_an_option_that_is_not_known_here_is_refused_and_not_ignored() -> None:
    newer = msgspec.msgpack.encode({"temperature": 0.7, "typical_p": 0.1})
    with pytest.raises(msgspec.ValidationError, match="typical_p"):
        msgspec.msgpack.decode(newer, type=SamplingOptions)
    known = SamplingOptions(temperature=0.7, seed=3)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(known), type=SamplingOptions) == known


def winners(logits: list[float], seeds: int = 300, **options: object) -> set[int]:
    """The tokens that come at all, after a prompt of token 0 and an output of token 1."""
    row, counts = np.array([logits], dtype=np.float32), [recount([0], [1])]
    tries = [SamplingOptions(**{"temperature": 1.0, **options}, seed=seed) for seed in range(seeds)]  # type: ignore[arg-type]
    return {sample_rows(row, option, [0], counts)[0] for option in tries}


def test_options_apply_in_the_order_that_their_documentation_says() -> None:
    # Bias before the repetition penalty: (2 + 3) / 2 = 2.5 < 3; the other way round 2 / 2 + 3 = 4 would win.
    assert winners([2.0, -9.0, 3.0], temperature=0.0, logit_bias=((0, 3.0),), repetition_penalty=2.0) == {2}
    # Repetition before presence: 4 / 2 - 1 = 1 < 1.2; the other way round (4 - 1) / 2 = 1.5 would win.
    assert winners([-9.0, 4.0, 1.2], temperature=0.0, repetition_penalty=2.0, presence_penalty=1.0) == {2}
    # Penalties before top-k: token 1 leads by its raw logit and is out by its penalised one.
    assert winners([-9.0, 3.0, 2.5, 2.0], top_k=2, presence_penalty=2.0) == {2, 3}
    # Temperature before top-p: the two likeliest hold 0.88 at T = 1; at T = 100 it takes all four.
    assert winners([2.0, 2.0, 0.0, 0.0], top_p=0.85) == {0, 1}
    assert winners([2.0, 2.0, 0.0, 0.0], top_p=0.85, temperature=100.0) == {0, 1, 2, 3}
    # Top-k before top-p: of the two left each holds half, so one reaches 0.4; of all five it would take two.
    assert winners([1.0, 1.0, 1.0, 1.0, 1.0], top_k=2, top_p=0.4) == {0}
    assert winners([1.0, 1.0, 1.0, 1.0, 1.0], top_p=0.4) == {0, 1}
    # Top-p before min-p: of all tokens it takes two to reach 0.5; of the two that min-p leaves the first has 0.57 alone.
    logits = [float(np.log(share)) for share in (0.4, 0.3, 0.2, 0.1)]
    assert winners(logits, top_p=0.5, min_p=0.6) == {0, 1}
    assert winners(logits, top_p=0.8) == {0, 1, 2}
    assert winners(logits, top_p=0.8, min_p=0.6) == {0, 1}


def test_top_k_keeps_exactly_k_and_of_equals_the_lowest_ids() -> None:
    assert winners([1.0, 2.0, 1.0, 1.0], top_k=2) == {0, 1}
    assert winners([1.0, 1.0, 1.0, 1.0], top_k=3) == {0, 1, 2}


def test_the_prompt_counts_for_the_repetition_penalty_alone() -> None:
    row = np.array([[5.0, 4.0]], dtype=np.float32)
    for options, token in (
        (SamplingOptions(repetition_penalty=2.0), 1),
        (SamplingOptions(presence_penalty=2.0), 0),
        (SamplingOptions(frequency_penalty=2.0), 0),
    ):
        assert sample_rows(row, options, [3], [recount([0, 0, 0], [])]) == [token]


def test_penalties_without_counts_and_biases_outside_the_vocabulary_are_refused() -> None:
    row = np.zeros((1, 10), dtype=np.float32)
    with pytest.raises(UsageError, match="counts"):
        sample_rows(row, SamplingOptions(presence_penalty=1.0), [0])
    with pytest.raises(UsageError, match="token 10, the vocabulary has 10"):
        sample_rows(row, SamplingOptions(logit_bias=((10, 1.0),)), [0])


def test_a_penalty_that_overflows_is_refused_like_any_row_that_is_not_finite() -> None:
    row = np.array([[3e38, 0.0]], dtype=np.float32)
    with pytest.raises(StageFailed, match="row 0"):
        sample_rows(row, SamplingOptions(repetition_penalty=0.01), [0], [recount([0], [])])


def test_sampling_leaves_the_logits_as_they_were() -> None:
    row = np.arange(10, dtype=np.float32)[None]
    sample_rows(row, SamplingOptions(temperature=1.0, presence_penalty=1.0, logit_bias=((3, 9.0),)), [0], [recount([], [9])])
    assert row[0].tolist() == list(range(10))


@settings(deadline=None, max_examples=80)
@given(row=rows_of(700), top=st.integers(0, 20), token=st.integers(0, 699))
def test_log_probabilities_are_those_of_the_softmax_of_the_raw_logits(row: NDArray[np.float32], top: int, token: int) -> None:
    wide = row.astype(np.float64) - float(row.max())
    exact = wide - np.log(np.exp(wide).sum())
    order = sorted((found for found in range(700) if np.isfinite(row[found])), key=lambda found: (-row[found], found))[:top]
    (found,) = log_probabilities(row[None], [token], top)
    near = {"abs": 1e-6 + 1e-12 * abs(float(row.max())), "rel": 1e-9}
    assert found.logprob == pytest.approx(exact[token], **near)
    assert [index for index, _ in found.top] == order
    assert [value for _, value in found.top] == pytest.approx(exact[order].tolist(), **near)

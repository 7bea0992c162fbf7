from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from farflung.core.errors import StageFailed
from farflung.core.sampling import SamplingOptions
from farflung.sampling import sample_rows
from farflung.sampling.noise import gumbel, noise_key, noise_words

SAMPLES = 20_000
TINY = np.array([2.0, 1.0, 0.5, 0.5, -1.0, -3.0], dtype=np.float32)
CHI_SQUARE_1E_4 = {2: 18.42, 3: 21.11, 5: 25.74}  # exceeded once in 10,000 honest experiments, by degrees of freedom


def kept_by_top_p(row: NDArray[np.float32], temperature: float, top_p: float) -> NDArray[np.intp]:
    """Top-p by a full sort."""
    scaled = (row.astype(np.float64) - float(row.max())) / temperature
    weights = np.exp(scaled)
    order = np.lexsort((np.arange(len(row)), -scaled))
    count = int(np.searchsorted(np.cumsum(weights[order]), top_p * weights.sum())) + 1
    return np.sort(order[:count])


def by_brute_force(row: NDArray[np.float32], options: SamplingOptions, position: int) -> int:
    """Noise for every token, no bounds."""
    ids = np.arange(len(row))
    noise = gumbel(noise_words(noise_key(options.seed, options.choice), position, ids.astype(np.uint64)))
    scores = (row.astype(np.float64) - float(row.max())) / options.temperature + noise
    kept = ids if options.top_p == 1.0 else kept_by_top_p(row, options.temperature, options.top_p)
    return int(kept[np.argmax(scores[kept])])


def chi_square(tokens: list[int], probabilities: NDArray[np.float64]) -> float:
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0.0].sum() == 0
    expected = probabilities[probabilities > 0.0] * len(tokens)
    return float(((counts[probabilities > 0.0] - expected) ** 2 / expected).sum())


def softmax(row: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    weights = np.exp(row.astype(np.float64) / temperature)
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_tokens_come_as_often_as_the_softmax_at_the_temperature_says(temperature: float) -> None:
    rows = np.broadcast_to(TINY, (SAMPLES, len(TINY)))
    tokens = sample_rows(rows, SamplingOptions(temperature=temperature, seed=11), range(SAMPLES))
    assert chi_square(tokens, softmax(TINY, temperature)) < CHI_SQUARE_1E_4[5]


def test_tokens_come_as_often_over_seeds_as_over_positions() -> None:
    tokens = [sample_rows(TINY[None], SamplingOptions(temperature=1.0, seed=seed), [5])[0] for seed in range(SAMPLES)]
    assert chi_square(tokens, softmax(TINY, 1.0)) < CHI_SQUARE_1E_4[5]


@pytest.mark.parametrize(("top_p", "kept"), [(0.80, [0, 1, 2]), (0.90, [0, 1, 2, 3])])
def test_top_p_renormalises_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    rows = np.broadcast_to(TINY, (SAMPLES, len(TINY)))
    tokens = sample_rows(rows, SamplingOptions(temperature=1.0, top_p=top_p, seed=3), range(SAMPLES))
    probabilities = np.where(np.isin(np.arange(len(TINY)), kept), softmax(TINY, 1.0), 0.0)
    assert chi_square(tokens, probabilities / probabilities.sum()) < CHI_SQUARE_1E_4[len(kept) - 1]


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


@settings(deadline=None, max_examples=150)
@given(
    row=rows_of(4000),
    temperature=st.sampled_from([1e-300, 1e-3, 0.3, 0.7, 1.0, 2.0, 100.0]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.95, 0.999999, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31),
)
def test_bounded_candidates_give_the_same_token_as_noise_for_every_token(
    row: NDArray[np.float32], temperature: float, top_p: float, seed: int, position: int
) -> None:
    options = SamplingOptions(temperature=temperature, top_p=top_p, seed=seed)
    with np.errstate(over="ignore"):
        assert sample_rows(row[None], options, [position]) == [by_brute_force(row, options, position)]


def test_a_token_far_below_the_head_wins_when_its_noise_demands_it() -> None:
    """A head of one token, and a tail so wide that some of it outbids the head about half the time."""
    row = np.full(60_000, -11.0, dtype=np.float32)
    row[0] = 0.0
    options = SamplingOptions(temperature=1.0, seed=4)
    tokens = sample_rows(np.broadcast_to(row, (60, len(row))), options, range(60))
    assert tokens == [by_brute_force(row, options, position) for position in range(60)]
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

"""The token after each row of logits.

Greedy takes the greatest logit. Otherwise the token is the argmax, over the candidates that truncation leaves, of
logit / T + noise (``sampling.noise``), in float64; equal scores go to the lowest id. Invariant: the token is a function of
(row, options, position) alone, whatever other rows are computed beside it.

A row passes through three steps, each a function of arrays: *scale* (logits to (logit - greatest) / T), *truncate* (which
tokens stay candidates), *draw* (noise and argmax). Penalties and biases belong before the first, further truncations beside
top-p.

Noise costs far more than reading a logit, so ``draw`` computes it only for tokens that can still win: noise never exceeds
``MAX_NOISE``, hence a token scaled to less than the best score so far minus ``MAX_NOISE`` has lost already. This is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from farflung.core.errors import StageFailed
from farflung.core.sampling import SamplingOptions
from farflung.sampling.noise import MAX_NOISE, NoiseKey, Words, gumbel, least_word, noise_key, noise_words

_HEAD = 1024  # up to here, noise for all candidates costs less than choosing among them
_HEAD_FLOOR = -5.0  # scaled logits from here on make the head: few tokens, and one of them nearly always wins
_NUCLEUS_FLOOR = -8.0  # of Qwen and Gemma, 50-900 tokens lie above it, and mostly all that top-p 0.95 keeps
_BINS_PER_UNIT = 4  # of the scaled logit, where top-p looks for a lower floor
_BINS = 128


def sample_rows(logits: NDArray[np.float32], options: SamplingOptions, positions: Sequence[int]) -> list[int]:
    """The next token for each row.

    Args:
        logits: float32 [n, vocab]; -inf forbids a token.
        options: of the session that all rows belong to.
        positions: position in its text of the token to be sampled, per row.

    Raises:
        StageFailed: a row holds NaN or +inf, or nothing but -inf.
    """
    key = noise_key(options.seed, options.choice)
    return [
        _sample(row, _peak(row, index, position), options, key, position)
        for index, (row, position) in enumerate(zip(logits, positions, strict=True))
    ]


def _peak(row: NDArray[np.float32], index: int, position: int) -> int:
    """The first id of the greatest logit; of a NaN, where there is one."""
    peak = int(row.argmax())
    if not np.isfinite(row[peak]):
        raise StageFailed(
            f"the logits of row {index} (position {position}) are unusable: their greatest value is {row[peak]}",
            hint="the weights or the activations are damaged; try fp32, and verify the model's digest",
        )
    return peak


def _sample(row: NDArray[np.float32], peak: int, options: SamplingOptions, key: NoiseKey, position: int) -> int:
    if options.greedy:
        return peak
    scaled = _scale(row, float(row[peak]), options.temperature)
    if options.top_p == 1.0:
        return draw(np.arange(len(scaled)), scaled, key, position)
    ids = nucleus(scaled, options.top_p)
    return draw(ids, scaled[ids], key, position)


def _scale(row: NDArray[np.float32], greatest: float, temperature: float) -> NDArray[np.float64]:
    """(logit - greatest) / T: differs from logit / T by a constant, and cannot overflow upwards however small T is."""
    scaled = row.astype(np.float64)
    scaled -= greatest
    with np.errstate(over="ignore"):  # to -inf, at a temperature next to 0: right
        scaled /= temperature
    return scaled


def nucleus(scaled: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """The ids top-p keeps, in ascending order.

    Tokens in order of falling probability, equal ones by rising id, up to and including the one with which the cumulative
    probability first reaches ``top_p``. Probabilities are those of the softmax over *all* tokens, at the temperature.

    Args:
        scaled: float64 [vocab], the greatest 0.
        top_p: in (0, 1).
    """
    weights = np.exp(scaled)
    goal = top_p * weights.sum()
    ids = np.arange(0)
    for floor in _nucleus_floors(scaled, weights, goal):
        ids = np.flatnonzero(scaled >= floor)
        order = np.argsort(-scaled[ids], kind="stable")
        last = int(np.searchsorted(np.cumsum(weights[ids[order]]), goal))
        if last < len(ids):
            return np.sort(ids[order[: last + 1]])
    return ids  # rounding kept the sum of all just below the goal


def _nucleus_floors(scaled: NDArray[np.float64], weights: NDArray[np.float64], goal: float) -> Iterator[float]:
    """Scaled logits above which the nucleus may lie, tried in turn: a guess, what a histogram says, everything."""
    yield _NUCLEUS_FLOOR
    bins = np.minimum(scaled * -_BINS_PER_UNIT, _BINS).astype(np.intp)
    reached = int(np.searchsorted(np.cumsum(np.bincount(bins, weights)), goal))
    yield -(reached + 1) / _BINS_PER_UNIT
    yield -np.inf


def draw(ids: NDArray[np.intp], scaled: NDArray[np.float64], key: NoiseKey, position: int) -> int:
    """The candidate with the greatest scaled logit + noise; of equal ones the lowest id.

    Args:
        ids: [n >= 1] of the candidates, ascending.
        scaled: float64 [n], the greatest 0.
        key: of the choice.
        position: of the token to be sampled.
    """
    if len(ids) <= _HEAD:
        return _best(ids, scaled, noise_words(key, position, ids.astype(np.uint64)))[1]
    in_head = scaled >= _HEAD_FLOOR
    head = ids[in_head]
    winner = _best(head, scaled[in_head], noise_words(key, position, head.astype(np.uint64)))
    best = -winner[0]
    in_reach = np.flatnonzero(~in_head & (scaled >= best - MAX_NOISE))
    tail = ids[in_reach]
    # A token of the tail needs this much noise to win. Comparing words spares two logarithms for nearly all of them.
    words = noise_words(key, position, tail.astype(np.uint64))
    lucky = np.flatnonzero(words >= np.uint64(least_word(best - _HEAD_FLOOR)))
    if len(lucky):
        winner = min(winner, _best(tail[lucky], scaled[in_reach[lucky]], words[lucky]))
    return winner[1]


def _best(ids: NDArray[np.intp], scaled: NDArray[np.float64], words: Words) -> tuple[float, int]:
    """(-score, id) of the winner: the least such pair, so that equal scores go to the lowest id."""
    scores = scaled + gumbel(words)
    index = int(np.argmax(scores))
    return -float(scores[index]), int(ids[index])

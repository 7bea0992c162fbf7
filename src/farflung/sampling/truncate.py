"""Which tokens stay candidates: top-k, top-p, min-p.

Tokens are ordered by falling logit, equal ones by rising id, and each truncation keeps a beginning of that order; hence no
full sort: only the tokens above a floor are put in order, and the floor is lowered until it is low enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.core.sampling import SamplingOptions

_FLOORS = (-8.0, -16.0)  # of Qwen and Gemma, 50-900 tokens lie above the first, and mostly all that top-p 0.95 keeps
_BINS_PER_UNIT = 8  # of the scaled logit, where top-p looks for its lower end
_BINS = 256


class Candidates(NamedTuple):
    """Attributes:
    ids: [n] whole numbers, ascending.
    logits: float32 [n].
    """

    ids: NDArray[np.integer[Any]]
    logits: NDArray[np.float32]


def scale(logits: NDArray[np.float32], greatest: float, temperature: float) -> NDArray[np.float64]:
    """(logit - greatest) / T: differs from logit / T by a constant, and cannot overflow upwards however small T is."""
    scaled = logits.astype(np.float64)
    scaled -= greatest
    with np.errstate(over="ignore"):  # to -inf, at a temperature next to 0: right
        scaled /= temperature
    return scaled


def truncate(every: Candidates, greatest: float, options: SamplingOptions) -> Candidates:
    """Top-k, then top-p over what it left (renormalised), then min-p.

    Args:
        every: all tokens of the vocabulary.
        greatest: their greatest logit, finite.
        options: the temperature is above 0.
    """
    kept, row = every, every.logits
    if 0 < options.top_k < len(row):
        kept = _top_k(row, greatest, options.temperature, options.top_k)
    elif options.top_p == 1.0 and options.min_p > 0.0:
        # Exactly which is decided below; until then a little more than rounding may take away.
        kept = _at_least(row, greatest + math.log(options.min_p) * options.temperature - 1e-6 * abs(greatest))
    if options.top_p < 1.0:
        kept = nucleus(kept, greatest, options.temperature, options.top_p)
    if options.min_p > 0.0:
        likely = scale(kept.logits, greatest, options.temperature) >= math.log(options.min_p)
        kept = Candidates(kept.ids[likely], kept.logits[likely])
    return kept


def likeliest(row: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Ids of the ``count`` greatest logits, the greatest first, of equal ones the lowest id first."""
    ids, logits = _top_k(row, float(row.max()), 1.0, min(count, len(row)))
    return ids[_in_order(logits)].astype(np.intp)


def _top_k(row: NDArray[np.float32], greatest: float, temperature: float, k: int) -> Candidates:
    """The first ``k`` tokens in order, 1 <= k <= vocab."""
    found = next(found for floor in _floors(greatest, temperature) if len((found := _at_least(row, floor)).ids) >= k)
    if len(found.ids) > 8 * k:  # spare sorting most of them
        found = _kept(found, np.flatnonzero(found.logits >= np.partition(found.logits, -k)[-k]))
    return _kept(found, _in_order(found.logits)[:k])


def nucleus(candidates: Candidates, greatest: float, temperature: float, top_p: float) -> Candidates:
    """What top-p keeps: tokens in order, up to and including the one with which the cumulative probability reaches ``top_p``.

    Probabilities are those of the softmax over ``candidates``, at the temperature.
    """
    logits = candidates.logits
    scaled = scale(logits, greatest, temperature)
    weights = np.exp(scaled)
    goal = top_p * float(weights.sum())
    head = np.flatnonzero(scaled >= _FLOORS[0])
    order = head[_in_order(logits[head])]
    last = int(np.searchsorted(np.cumsum(weights[order]), goal))
    if last < len(order):
        return _kept(candidates, order[: last + 1])
    # A histogram says in which bin the nucleus ends: what lies above is kept, and only that bin is put in order.
    bins = np.minimum(scaled * -_BINS_PER_UNIT, _BINS).astype(np.intp)
    reached = np.cumsum(np.bincount(bins, weights, minlength=_BINS + 1))
    end = min(int(np.searchsorted(reached, goal)), _BINS)
    above = np.flatnonzero(bins < end)
    edge = np.flatnonzero(bins == end)
    order = edge[_in_order(logits[edge])]
    before = float(reached[end - 1]) if end else 0.0
    last = int(np.searchsorted(before + np.cumsum(weights[order]), goal))  # past the end: rounding kept the sum just below
    return _kept(candidates, np.concatenate([above, order[: last + 1]]))


def _kept(candidates: Candidates, indices: NDArray[np.intp]) -> Candidates:
    indices = np.sort(indices)
    return Candidates(candidates.ids[indices], candidates.logits[indices])


def _floors(greatest: float, temperature: float) -> Iterator[float]:
    """Logits to look above, tried in turn."""
    for floor in _FLOORS:
        yield greatest + floor * temperature
    yield -math.inf


def _at_least(row: NDArray[np.float32], floor: float) -> Candidates:
    """The tokens at or above ``floor``, and perhaps some that lie less than the rounding of float32 below it."""
    with np.errstate(over="ignore"):
        bound = np.nextafter(np.float32(floor), np.float32(-np.inf))
    ids = np.flatnonzero(row >= bound)
    return Candidates(ids, row[ids])


def _in_order(logits: NDArray[np.float32]) -> NDArray[np.intp]:
    """Indices by falling logit; equal ones keep their order."""
    return np.argsort(-logits, kind="stable")

"""Which tokens stay candidates: top-k, top-p, min-p.

Tokens are ordered by falling logit, equal ones by rising id, and each truncation keeps a beginning of that order; hence no
full sort: only the logits above a floor are looked at, and the floor is lowered until it is low enough. Where many lie above it
(a great temperature, a flat row), sums over bins of logits say which bin holds the last one kept, and that alone is sorted: a
third of the time for 150,000 logits at temperature 100. Never indices are sorted, which takes thrice as long as values: the
least logit kept says which tokens they are.

Called with overflow allowed (``np.errstate(over="ignore")``): a logit too far below the greatest is scaled to -inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.core.sampling import SamplingOptions

_FLOORS = (-8.0, -11.0, -15.0, -20.0)
"""Scaled logits above which the kept tokens may all lie, tried in turn. Of Qwen and Gemma, 15 to 900 lie above the first."""

_BINS = 4096
_SORTED = 2048  # up to here, sorting costs less than summing bins
_ROUNDS = 3  # each finer by as many bins; more are needed only of rows made for it
_NO_MASS = 746.0  # exp of a scaled logit so far below 0 is 0

_NEVER = np.float32(-np.inf)
_LEAST_TEMPERATURE = 1e-30  # that float32 can divide by


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
    scaled /= temperature  # overflows to -inf at a temperature next to 0, and rightly so
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
        kept = _of(every, _top_k(row, greatest, options.temperature, options.top_k))
    elif options.top_p == 1.0 and options.min_p > 0.0:
        # Exactly which is decided below; until then a little more than rounding may take away.
        kept = _of(every, _above(row, greatest + math.log(options.min_p) * options.temperature - 1e-6 * abs(greatest)))
    if options.top_p < 1.0:
        kept = nucleus(kept, greatest, options.temperature, options.top_p)
    if options.min_p > 0.0:
        likely = scale(kept.logits, greatest, options.temperature) >= math.log(options.min_p)
        kept = Candidates(kept.ids[likely], kept.logits[likely])
    return kept


def likeliest(row: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Ids of the ``count`` greatest logits, the greatest first, of equal ones the lowest id first."""
    ids = _top_k(row, float(row.max()), 1.0, min(count, len(row)))
    return ids[np.argsort(-row[ids], kind="stable")]


def _top_k(row: NDArray[np.float32], greatest: float, temperature: float, k: int) -> NDArray[np.intp]:
    """The first ``k`` tokens in order, 1 <= k <= vocab; ascending."""
    ids = next(ids for floor in _floors(greatest, temperature) if len(ids := _above(row, floor)) >= k)
    logits = row[ids]
    return ids[_first(logits, k, np.partition(logits, -k)[-k])]


def _first(logits: NDArray[np.float32], count: int, least: np.float32) -> NDArray[np.intp]:
    """Indices, ascending, of the first ``count`` logits in order, the last of which has the value ``least``."""
    found = np.flatnonzero(logits >= least)
    surplus = len(found) - count
    if surplus <= 0:
        return found
    equal = np.flatnonzero(logits[found] == least)
    return np.delete(found, equal[-surplus:])


def nucleus(candidates: Candidates, greatest: float, temperature: float, top_p: float) -> Candidates:
    """What top-p keeps: tokens in order, up to and including the one with which the cumulative probability reaches ``top_p``.

    Probabilities are those of the softmax over ``candidates``, at the temperature.
    """
    goal = 0.0
    for number, floor in enumerate(_floors(greatest, temperature)):
        above = _above(candidates.logits, floor)
        head = _of(candidates, above) if len(above) < len(candidates.ids) else candidates
        scaled = scale(head.logits, greatest, temperature)
        weights = np.exp(scaled)
        total = float(weights.sum())
        if not number:
            goal = top_p * (total + _mass_without(above, candidates.logits, greatest, temperature))
        if total >= goal:
            break
    passed, logits = 0, head.logits  # so many are kept for certain, and what comes after them in order is looked at
    for _ in range(_ROUNDS):
        if len(logits) <= _SORTED or (bins := _bins(scaled)) is None:
            break
        sums = np.cumsum(np.bincount(bins, weights, _BINS))
        last = min(int(np.searchsorted(sums, goal)), _BINS - 1)
        if last:
            goal -= float(sums[last - 1])
            passed += int(np.count_nonzero(bins < last))
        inside = bins == last
        logits, scaled, weights = logits[inside], scaled[inside], weights[inside]
    falling = np.sort(logits)[::-1]
    reached = np.cumsum(np.exp(scale(falling, greatest, temperature)))
    count = int(np.searchsorted(reached, goal)) + 1  # beyond all where rounding kept their sum just below the goal
    return _of(head, _first(head.logits, passed + count, falling[min(count, len(falling)) - 1]))


def _bins(scaled: NDArray[np.float64]) -> NDArray[np.intp] | None:
    """The bin of each, of equal widths, from 0 for the greatest; no greater logit is in a later one. None: all are equal."""
    top = float(scaled.max())
    span = top - max(float(scaled.min()), top - _NO_MASS)
    if not span > 0.0:
        return None
    bins = top - scaled
    bins *= _BINS / span
    np.minimum(bins, _BINS - 1, out=bins)
    return bins.astype(np.intp)


def mass(logits: NDArray[np.float32], greatest: float, temperature: float) -> float:
    """Sum of exp((logit - greatest) / T): in float64 of the likely tokens, in float32 of the others, which is thrice as fast.

    The others are each less than e^-8 of the likeliest; what float32 loses there is below one millionth of their share.
    """
    head = _above(logits, greatest + _FLOORS[0] * temperature)
    weights = np.exp(scale(logits[head], greatest, temperature))
    return float(weights.sum()) + _mass_without(head, logits, greatest, temperature)


def _mass_without(head: NDArray[np.intp], logits: NDArray[np.float32], greatest: float, temperature: float) -> float:
    """Of the logits that are not in ``head``, in float32."""
    if len(head) == len(logits):
        return 0.0
    rest = logits - np.float32(greatest)
    if temperature != 1.0:
        rest /= np.float32(max(temperature, _LEAST_TEMPERATURE))
    np.exp(rest, out=rest)
    rest[head] = 0.0
    return float(rest.sum())


def _of(candidates: Candidates, indices: NDArray[np.intp]) -> Candidates:
    return Candidates(candidates.ids[indices], candidates.logits[indices])


def _floors(greatest: float, temperature: float) -> Iterator[float]:
    """Logits to look above, tried in turn."""
    for floor in _FLOORS:
        yield greatest + floor * temperature
    yield -math.inf


def _above(row: NDArray[np.float32], floor: float) -> NDArray[np.intp]:
    """Indices of the logits at or above ``floor``, and perhaps of some less than the rounding of float32 below it."""
    bound = np.nextafter(np.float32(floor), _NEVER)
    return np.flatnonzero(row >= bound)

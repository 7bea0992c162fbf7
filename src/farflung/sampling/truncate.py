"""Which tokens stay candidates: top-k, top-p, min-p.

Tokens are ordered by falling logit, equal ones by rising id, and each truncation keeps a beginning of that order; hence no
full sort: only the logits above a floor are looked at, and the floor is lowered until it is low enough. Never their indices
are sorted, which takes thrice as long: the least logit kept says which tokens they are.

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
    goal = top_p * mass(candidates.logits, greatest, temperature)
    head = candidates
    for floor in _floors(greatest, temperature):
        head = _of(candidates, _above(candidates.logits, floor))
        if np.exp(scale(head.logits, greatest, temperature)).sum() >= goal:
            break
    falling = np.sort(head.logits)[::-1]
    reached = np.cumsum(np.exp(scale(falling, greatest, temperature)))
    count = int(np.searchsorted(reached, goal)) + 1  # beyond all where rounding kept their sum just below the goal
    return _of(head, _first(head.logits, count, falling[min(count, len(falling)) - 1]))


def mass(logits: NDArray[np.float32], greatest: float, temperature: float) -> float:
    """Sum of exp((logit - greatest) / T): in float64 of the likely tokens, in float32 of the others, which is thrice as fast.

    The others are each less than e^-8 of the likeliest; what float32 loses there is below one millionth of their share.
    """
    head = _above(logits, greatest + _FLOORS[0] * temperature)
    total = float(np.exp(scale(logits[head], greatest, temperature)).sum())
    if len(head) == len(logits):
        return total
    rest = logits - np.float32(greatest)
    if temperature != 1.0:
        rest /= np.float32(max(temperature, _LEAST_TEMPERATURE))
    np.exp(rest, out=rest)
    rest[head] = 0.0
    return total + float(rest.sum())


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

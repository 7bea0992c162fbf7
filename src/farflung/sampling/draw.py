"""The Gumbel-max draw: of the candidates, the one with the greatest logit / T + noise; of equal ones the lowest id.

Noise costs far more than reading a logit, so it is computed only for candidates that can still win. Noise never exceeds
``MAX_NOISE``, hence a candidate scaled to less than the best score so far minus ``MAX_NOISE`` has lost already. This is exact.

Called with overflow allowed, as ``truncate`` is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from farflung.sampling.noise import MAX_NOISE, Ids, NoiseKey, Words, gumbel, least_word, noise_words
from farflung.sampling.truncate import Candidates, scale

_FEW = 1024  # up to here, noise for all candidates costs less than choosing among them
_HEAD_FLOOR = -5.0  # scaled logits from here on make the head: few tokens, and one of them nearly always wins
_DENSE = 0.25  # from this share of the candidates on, computing all words costs less than gathering the ids that need one


def draw(candidates: Candidates, greatest: float, temperature: float, key: NoiseKey, position: int) -> int:
    """The token id that wins.

    Args:
        candidates: at least one; the one with the greatest logit among them.
        greatest: that logit.
        temperature: above 0.
        key: of the choice.
        position: of the token to be sampled.
    """
    ids, logits = candidates
    if len(ids) <= _FEW:
        return _best(ids, scale(logits, greatest, temperature), noise_words(key, position, ids))[1]
    floor = np.float32(greatest + _HEAD_FLOOR * temperature)
    head = np.flatnonzero(logits >= floor)
    if len(head) == len(ids):
        return _best_of_head(ids, scale(logits, greatest, temperature), noise_words(key, position, ids))[1]
    winner = _best_of_head(ids[head], scale(logits[head], greatest, temperature), noise_words(key, position, ids[head]))
    best = -winner[0]
    # Outside the head nothing is scaled above the ceiling: a token there needs this word at least.
    ceiling = min(0.0, float(scale(np.array([floor]), greatest, temperature)[0]))
    least = least_word(best - ceiling)
    if least >= 2**32:
        return winner[1]
    reach = _in_reach(logits, greatest, best - MAX_NOISE, temperature)
    rest_ids = ids if reach is None else ids[reach]
    words = noise_words(key, position, rest_ids)
    lucky = np.flatnonzero(words >= np.uint32(least))
    if len(lucky):
        found = lucky if reach is None else reach[lucky]
        winner = min(winner, _best(ids[found], scale(logits[found], greatest, temperature), words[lucky]))
    return winner[1]


def _in_reach(logits: NDArray[np.float32], greatest: float, low: float, temperature: float) -> NDArray[np.intp] | None:
    """Indices of at least the logits that are scaled to ``low`` or more; None where those are many."""
    margin = 1e-6 * abs(greatest) + 1e-5 * temperature  # more than rounding to float32 takes away
    above = logits >= np.float32(greatest + low * temperature - margin)
    return None if np.count_nonzero(above) > _DENSE * len(logits) else np.flatnonzero(above)


def _best_of_head(ids: Ids, scaled: NDArray[np.float64], words: Words) -> tuple[float, int]:
    """As ``_best``, of scaled logits up to 0: where they are many (a flat row), the noise only of words that can still win."""
    if len(ids) > _FEW:
        luckiest = int(np.argmax(words))
        score = float(scaled[luckiest] + gumbel(words[luckiest : luckiest + 1])[0])
        lucky = np.flatnonzero(words >= np.uint32(min(least_word(score), int(words[luckiest]))))
        ids, scaled, words = ids[lucky], scaled[lucky], words[lucky]
    return _best(ids, scaled, words)


def _best(ids: Ids, scaled: NDArray[np.float64], words: Words) -> tuple[float, int]:
    """(-score, id) of the winner: the least such pair, so that equal scores go to the lowest id."""
    scores = scaled + gumbel(words)
    index = int(np.argmax(scores))
    return -float(scores[index]), int(ids[index])

"""Log-probabilities of sampled tokens and of the likeliest ones beside them; see ``TokenLogprob`` for which logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from farflung.core.sampling import TokenLogprob
from farflung.sampling.truncate import likeliest, mass


def log_probabilities(logits: NDArray[np.float32], tokens: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """One for each row.

    Args:
        logits: float32 [n, vocab] as the model gave them, the greatest of each row finite.
        tokens: the token sampled in each row.
        top: how many alternatives, 0 or more.
    """
    with np.errstate(over="ignore"):
        return tuple(_of_row(row, token, top) for row, token in zip(logits, tokens, strict=True))


def _of_row(row: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    greatest = float(row.max())
    log_sum = greatest + math.log(mass(row, greatest, 1.0))
    ids = likeliest(row, top).tolist() if top else []
    alternatives = ((index, float(row[index]) - log_sum) for index in ids)
    return TokenLogprob(float(row[token]) - log_sum, tuple(found for found in alternatives if math.isfinite(found[1])))

"""The token after each row of logits.

A row passes through four steps, each a function of arrays: *adjust* (bias and penalties), *truncate* (which tokens stay
candidates), *draw* (noise and argmax), or the plain argmax after the first where greedy is asked for. Invariant: the token is a
function of (row, options, counts of the text before it, position) alone, whatever other rows are computed beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from farflung.core.errors import StageFailed, UsageError
from farflung.core.sampling import SamplingOptions
from farflung.sampling.adjust import Biases, adjust, biases
from farflung.sampling.draw import draw
from farflung.sampling.history import Counts
from farflung.sampling.noise import noise_key
from farflung.sampling.truncate import Candidates, truncate


def sample_rows(
    logits: NDArray[np.float32],
    options: SamplingOptions,
    positions: Sequence[int],
    counts: Sequence[Counts] | None = None,
) -> list[int]:
    """The next token for each row.

    Args:
        logits: float32 [n, vocab]; -inf forbids a token.
        options: of the session that all rows belong to.
        positions: position in its text of the token to be sampled, per row.
        counts: of the text before that token, per row; needed where ``options.needs_history``, else ignored.

    Raises:
        StageFailed: a row holds NaN or +inf, or nothing but -inf.
        UsageError: penalties without counts, or a bias on a token that the vocabulary lacks.
    """
    if options.needs_history and counts is None:
        raise UsageError("penalties need the counts of the text before each row")
    vocab = logits.shape[1]
    bias = biases(options)
    if bias is not None and int(bias.ids.max()) >= vocab:
        raise UsageError(f"logit_bias names token {bias.ids.max()}, the vocabulary has {vocab}")
    with np.errstate(over="ignore"):  # what is too great to scale or penalise becomes infinite: lost, or refused by name
        return _tokens(logits, options, positions, bias, counts)


def _tokens(
    logits: NDArray[np.float32],
    options: SamplingOptions,
    positions: Sequence[int],
    bias: Biases | None,
    counts: Sequence[Counts] | None,
) -> list[int]:
    key = noise_key(options.seed, options.choice)
    ids = np.arange(0 if options.greedy else logits.shape[1], dtype=np.uint32)
    found: list[int] = []
    for index, position in enumerate(positions):
        raw = logits[index]
        peak = _peak(raw, index, position)
        row = adjust(raw, options, bias, counts[index] if counts is not None else None)
        if row is not raw:
            peak = _peak(row, index, position)
        if not options.greedy:
            greatest = float(row[peak])
            kept = truncate(Candidates(ids, row), greatest, options)
            peak = draw(kept, greatest, options.temperature, key, position)
        found.append(peak)
    return found


def _peak(row: NDArray[np.float32], index: int, position: int) -> int:
    """The first id of the greatest logit. Raises StageFailed where that is no number, or infinite."""
    peak = int(row.argmax())  # of a NaN, where there is one
    if not np.isfinite(row[peak]):
        raise StageFailed(
            f"the logits of row {index} (position {position}) are unusable: their greatest value is {row[peak]}",
            hint="the weights or the activations are damaged; try fp32, and verify the model's digest",
        )
    return peak

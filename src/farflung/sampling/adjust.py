"""Bias and penalties: a row of logits as the options want it, before the temperature.

Each step is one IEEE operation in float32 per token, in a fixed order, so every machine gets the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.core.sampling import SamplingOptions
from farflung.sampling.history import Counts


class Biases(NamedTuple):
    """The logit bias of a session. Attributes: ids int64 [n], each once; values float32 [n]."""

    ids: NDArray[np.int64]
    values: NDArray[np.float32]


def biases(options: SamplingOptions) -> Biases | None:
    """None where there are none."""
    if not options.logit_bias:
        return None
    ids, values = zip(*options.logit_bias, strict=True)
    return Biases(np.array(ids, np.int64), np.array(values, np.float32))


def adjust(
    row: NDArray[np.float32], options: SamplingOptions, bias: Biases | None, counts: Counts | None
) -> NDArray[np.float32]:
    """Logit bias, then repetition, then frequency, then presence (vLLM's order); the row itself where nothing changes it.

    Args:
        row: float32 [vocab].
        options: of the session, and their ``biases``.
        counts: of the text before the token; needed where ``options.needs_history``.
    """
    penalised = options.needs_history and counts is not None and len(counts.ids) > 0
    if bias is None and not penalised:
        return row
    found = row.copy()
    if bias is not None:
        found[bias.ids] += bias.values
    if penalised and counts is not None:
        _penalise(found, options, counts)
    return found


def _penalise(row: NDArray[np.float32], options: SamplingOptions, counts: Counts) -> None:
    logits = row[counts.ids]
    if options.repetition_penalty != 1.0:
        by = np.float32(options.repetition_penalty)
        logits = np.where(counts.in_text > 0, np.where(logits > 0, logits / by, logits * by), logits)
    if options.frequency_penalty != 0.0:
        logits = logits - np.float32(options.frequency_penalty) * counts.in_output.astype(np.float32)
    if options.presence_penalty != 0.0:
        logits = logits - np.float32(options.presence_penalty) * (counts.in_output > 0).astype(np.float32)
    row[counts.ids] = logits

"""Sampling as the options' documentation says it, slowly and without any shortcut: what the tests compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from farflung.core.sampling import SamplingOptions
from farflung.sampling import Counts
from farflung.sampling.noise import gumbel, noise_key, noise_words


def recount(prompt: Sequence[int], output: Sequence[int]) -> Counts:
    """From scratch."""
    ids = sorted({*prompt, *output})
    text = [*prompt, *output]
    return Counts(
        np.array(ids, np.int64), np.array([text.count(i) for i in ids], int), np.array([output.count(i) for i in ids], int)
    )


def adjusted(
    row: NDArray[np.float32], options: SamplingOptions, prompt: Sequence[int], output: Sequence[int]
) -> NDArray[np.float32]:
    """Bias, then penalties, token by token."""
    found = row.copy()
    for token, bias in options.logit_bias:
        found[token] = np.float32(found[token] + np.float32(bias))
    for token in {*prompt, *output}:
        if found[token] > 0:
            found[token] = np.float32(found[token] / np.float32(options.repetition_penalty))
        else:
            found[token] = np.float32(found[token] * np.float32(options.repetition_penalty))
    for token in set(output):
        found[token] -= np.float32(np.float32(options.frequency_penalty) * np.float32(output.count(token)))
        found[token] -= np.float32(options.presence_penalty)
    return found


def kept(logits: NDArray[np.float32], options: SamplingOptions) -> list[int]:
    """Ids that truncation leaves, ascending; by full sorts."""
    scaled = (logits.astype(np.float64) - float(logits.max())) / options.temperature
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if options.top_k:
        order = order[: options.top_k]
    if options.top_p < 1.0:
        weights = np.exp(scaled[order])
        order = order[: int(np.searchsorted(np.cumsum(weights), options.top_p * weights.sum())) + 1]
    if options.min_p > 0.0:
        order = [token for token in order if scaled[token] >= np.log(options.min_p)]
    return sorted(order)


def probabilities(
    row: NDArray[np.float32],
    options: SamplingOptions,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> NDArray[np.float64]:
    """Exact chance of each token; the temperature is above 0."""
    logits = adjusted(row, options, prompt, output)
    ids = kept(logits, options)
    found = np.zeros(len(row))
    found[ids] = np.exp((logits[ids].astype(np.float64) - float(logits.max())) / options.temperature)
    return found / found.sum()


def token_after(
    row: NDArray[np.float32],
    options: SamplingOptions,
    position: int,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> int:
    """With noise for every token kept."""
    logits = adjusted(row, options, prompt, output)
    if options.greedy:
        return int(logits.argmax())
    ids = np.array(kept(logits, options))
    scores = (logits[ids].astype(np.float64) - float(logits.max())) / options.temperature
    scores = scores + gumbel(noise_words(noise_key(options.seed, options.choice), position, ids))
    return int(ids[np.argmax(scores)])

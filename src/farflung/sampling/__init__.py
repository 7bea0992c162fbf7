"""Logits to token: options in, keyed noise, one token out. Used by the tail and by drafters, so that they agree."""

from farflung.sampling.history import Counts, TokenHistory
from farflung.sampling.logprobs import log_probabilities
from farflung.sampling.sampler import sample_rows

__all__ = ["Counts", "TokenHistory", "log_probabilities", "sample_rows"]

"""Logits to token: options in, keyed noise, one token out. Used by the tail and by drafters, so that they agree."""

from farflung.sampling.history import Counts, TokenHistory
from farflung.sampling.logprobs import log_probabilities
from farflung.sampling.noise import prepare
from farflung.sampling.sampler import sample_rows
from farflung.sampling.session import Sampled, SessionSampler

__all__ = ["Counts", "Sampled", "SessionSampler", "TokenHistory", "log_probabilities", "prepare", "sample_rows"]

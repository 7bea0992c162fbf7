"""Logits to token: options in, keyed noise, one token out. Used by the tail and by drafters, so that they agree."""

from farflung.sampling.sampler import sample_rows

__all__ = ["sample_rows"]

"""What a caller asks of one generation."""

from __future__ import annotations

from dataclasses import dataclass, field

from farflung.core.sampling import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Attributes:
    max_tokens: the most tokens to generate.
    sampling: how the tail chooses them.
    stop: strings that end the text; they are not part of it.
    codecs: how rows may be coded between stages, in order of preference: ``fp32``, ``bf16``, ``int8``, ``int4``.
    ignore_eos: go on past the model's end-of-text token (for measurements).
    chunk_tokens: prompt tokens per window; 0: what the planner finds best on the route (``session.chunks``).
    batch: it can wait: stages serve interactive sessions first.
    answer_timeout_s: the longest wait for one token; prefill of a long prompt included.
    """

    max_tokens: int = 64
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ("int8",)
    ignore_eos: bool = False
    chunk_tokens: int = 0
    batch: bool = False
    answer_timeout_s: float = 120.0

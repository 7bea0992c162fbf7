"""The sampler of one session: its options, and the ids of its tree where the options look back at the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.core.errors import MalformedFrame
from farflung.core.sampling import SamplingOptions, TokenLogprob
from farflung.core.tree import TokenTree
from farflung.sampling.history import TokenHistory
from farflung.sampling.logprobs import log_probabilities
from farflung.sampling.sampler import sample_rows


class Sampled(NamedTuple):
    """``logprob`` is there where the options ask for it."""

    token: int
    logprob: TokenLogprob | None


class SessionSampler:
    """Told of every window in order, whether or not it wants an answer."""

    def __init__(self, options: SamplingOptions, prompt_tokens: int, vocab_size: int) -> None:
        self._options = options
        self._vocab_size = vocab_size
        self._history = TokenHistory(prompt_tokens) if options.needs_history else None

    def check(self, ids: NDArray[np.int32] | None, rows: int) -> None:
        """Raises MalformedFrame where a window of ``rows`` slots comes with other token ids than ``advance`` needs."""
        if self._history is None:
            return
        count = 0 if ids is None else ids.size
        if count != rows:
            raise MalformedFrame(
                f"{rows} slots came with {count} token ids", hint="with penalties the ids of every window go to the tail too"
            )
        if ids is not None and count and (int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size):
            raise MalformedFrame(f"token ids {ids.min()}..{ids.max()} are outside the vocabulary of {self._vocab_size}")

    def advance(self, slots: Sequence[int], ids: NDArray[np.int32] | None, tree: TokenTree) -> None:
        """See ``TokenHistory.advance``; ``ids`` have passed ``check``."""
        if self._history is not None:
            self._history.advance(slots, np.zeros(0, np.int32) if ids is None else ids, tree)

    def sample(self, logits: NDArray[np.float32], slots: Sequence[int], positions: Sequence[int]) -> list[Sampled]:
        """The token after each slot.

        Args:
            logits: float32 [slots, vocab].
            slots: alive or committed.
            positions: of the slots, not of the tokens after them.

        Raises:
            StageFailed, UsageError: see ``sample_rows``.
        """
        history = self._history
        counts = None if history is None else [history.counts(*place) for place in zip(slots, positions, strict=True)]
        tokens = sample_rows(logits, self._options, [position + 1 for position in positions], counts)
        if self._options.logprobs is None:
            return [Sampled(token, None) for token in tokens]
        return [*map(Sampled, tokens, log_probabilities(logits, tokens, self._options.logprobs))]

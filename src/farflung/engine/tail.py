"""The end of the last stage: rows to tokens, for all sessions of a step in one pass of the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch

from farflung.core.errors import FarflungError, ProtocolViolation
from farflung.core.ids import SessionId, short
from farflung.sampling import Sampled, SessionSampler

HEAD_ROWS = 64
"""Wanted rows that go through the head at a time: their logits are as wide as the vocabulary."""

LogitsHook = Callable[[SessionId, tuple[int, ...], torch.Tensor], None]


class Wanted(NamedTuple):
    """Which rows of a window want an answer.

    Attributes:
        session, sampler: whose window.
        slots: as wanted.
        rows: of the window, of each slot.
        positions: of each slot.
    """

    session: SessionId
    sampler: SessionSampler | None
    slots: tuple[int, ...]
    rows: tuple[int, ...]
    positions: tuple[int, ...]


class Tail:
    """Final norm, head and sampling."""

    def __init__(self, head: Callable[[torch.Tensor], torch.Tensor], on_logits: LogitsHook | None) -> None:
        """``head``: activations [1, rows, width] to logits. ``on_logits``: see ``BackendConfig``."""
        self._head = head
        self._on_logits = on_logits

    def answer(self, wanted: Sequence[Wanted], hidden: Sequence[torch.Tensor]) -> list[list[Sampled] | FarflungError]:
        """The token after each wanted slot of each window, or what is wrong with the window.

        All windows share a pass of the head: its weights, the largest of the model, are read once.

        Args:
            wanted: of each window.
            hidden: of each window, [rows, width].
        """
        pairs = [(number, index) for number, window in enumerate(wanted) for index in range(len(window.slots))]
        answers: list[list[Sampled] | FarflungError] = [[] for _ in wanted]
        for start in range(0, len(pairs), HEAD_ROWS):
            some = pairs[start : start + HEAD_ROWS]
            rows = torch.stack([hidden[number][wanted[number].rows[index]] for number, index in some])
            logits = self._head(rows[None])[0].float()
            first = 0
            for number, group in groupby(some, key=itemgetter(0)):
                indices = [index for _, index in group]
                part = slice(indices[0], indices[-1] + 1)
                own = logits[first : first + len(indices)]
                first += len(indices)
                answer = answers[number]
                if isinstance(answer, FarflungError):
                    continue
                try:
                    answer += self._sample(wanted[number], part, own)
                except FarflungError as error:
                    answers[number] = error
        return answers

    def _sample(self, window: Wanted, part: slice, logits: torch.Tensor) -> list[Sampled]:
        """The token after each of a part of the wanted slots, whose logits are fp32 [slots, vocab]."""
        slots = window.slots[part]
        if self._on_logits is not None:
            self._on_logits(window.session, slots, logits)
        if window.sampler is None:
            raise ProtocolViolation(f"session {short(window.session)} has no sampler at this stage")
        return window.sampler.sample(logits.numpy(), slots, list(window.positions[part]))

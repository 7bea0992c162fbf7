"""Which tokens stand before a row of a token tree, and how often: what penalties need to know.

The committed text is counted once, as it grows; a row adds the few pending tokens above it. So a row costs time in proportion
to the number of *different* tokens of its text, which grows far slower than the text and never beyond the vocabulary.
Invariant: the counts of a row are those of its text recounted from scratch, whatever commits and deaths came before.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from farflung.core.errors import ProtocolViolation
from farflung.core.tree import TokenTree


class Counts(NamedTuple):
    """The different tokens of one text, in no particular order.

    Attributes:
        ids: int64 [n], each once.
        in_text: int64 [n], times in prompt and output; 0 for a token that is not in it after all.
        in_output: int64 [n], times in the output.
    """

    ids: NDArray[np.int64]
    in_text: NDArray[np.int64]
    in_output: NDArray[np.int64]


class TokenHistory:
    """The token ids of one session's tree."""

    def __init__(self, prompt_tokens: int) -> None:
        """``prompt_tokens``: positions below it are the prompt, those from it on the output."""
        self._prompt_tokens = prompt_tokens
        self._tree = TokenTree()
        self._pending: dict[int, int] = {}  # alive slot -> token id
        self._committed = array("i")  # token id of each committed position
        self._column: dict[int, int] = {}  # token id -> its column in the table
        self._table: NDArray[np.int64] = np.zeros((3, 64), np.int64)  # rows: ids, in_text, in_output

    def advance(self, slots: Sequence[int], ids: NDArray[np.int32], tree: TokenTree) -> None:
        """Follows the session's tree: new slots with their token ids, then the state that a commit has left.

        Args:
            slots: the new ones.
            ids: int32 [slots].
            tree: the session's tree after the new slots were added and the commit, if any, applied.
        """
        self._pending.update(zip(slots, ids.tolist(), strict=True))
        if tree.committed_tokens > self._tree.committed_tokens:
            for span in tree.committed_between(self._tree.committed_tokens, tree.committed_tokens):
                for slot in span:
                    self._count(self._pending.pop(slot))
            self._pending = {slot: token for slot, token in self._pending.items() if slot in tree.alive}
        self._tree = tree

    def counts(self, slot: int, position: int) -> Counts:
        """Of the text that ends with ``slot``: the committed ids, those of its pending ancestors, its own.

        Args:
            slot: alive, or committed.
            position: its depth.

        Raises:
            ProtocolViolation: it is neither.
        """
        committed = len(self._committed)
        if slot not in self._tree.alive and position >= committed:
            raise ProtocolViolation(f"slot {slot} at position {position} is not part of the tree")
        changes: list[tuple[int, int, int]] = []  # token id, position, +1 or -1
        while (place := self._tree.alive.get(slot)) is not None:
            changes.append((self._pending[slot], place.position, 1))
            slot = place.parent
        # A row that its own window has committed may be followed by others that it does not see.
        changes += [(self._committed[later], later, -1) for later in range(position + 1, committed)]
        return self._changed(changes) if changes else Counts(*self._table[:, : len(self._column)])

    def _changed(self, changes: Sequence[tuple[int, int, int]]) -> Counts:
        known = len(self._column)
        table = np.zeros((3, known + len(changes)), np.int64)
        table[:, :known] = self._table[:, :known]
        fresh: dict[int, int] = {}
        for token, position, sign in changes:
            column = self._column.get(token)
            if column is None:
                column = fresh.setdefault(token, known + len(fresh))
                table[0, column] = token
            table[1, column] += sign
            table[2, column] += sign * (position >= self._prompt_tokens)
        return Counts(*table[:, : known + len(fresh)])

    def _count(self, token: int) -> None:
        column = self._column.setdefault(token, len(self._column))
        if column == self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
        self._table[0, column] = token
        self._table[1, column] += 1
        self._table[2, column] += len(self._committed) >= self._prompt_tokens
        self._committed.append(token)

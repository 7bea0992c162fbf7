"""Which tokens stand before a row of a token tree, and how often: what penalties need to know.

The committed text is counted once, as it grows; a row adds the pending tokens above it, or its own token to the counts of the
row before it where that is its parent. So a row costs time in proportion to the number of *different* tokens of its text, which
grows far slower than the text and never beyond the vocabulary.
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


class _Row(NamedTuple):
    """What the last row was told. ``fresh``: columns of its ``table`` for tokens that no committed text has, by token."""

    slot: int
    position: int
    table: NDArray[np.int64]
    fresh: dict[int, int]


class TokenHistory:
    """The token ids of one session's tree."""

    def __init__(self, prompt_tokens: int) -> None:
        """``prompt_tokens``: positions below it are the prompt, those from it on the output."""
        self._prompt_tokens = prompt_tokens
        self._tree = TokenTree()
        self._pending: dict[int, int] = {}  # alive slot -> token id
        self._last: _Row | None = None
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
        self._last = None

    def counts(self, slot: int, position: int) -> Counts:
        """Of the text that ends with ``slot``: the committed ids, those of its pending ancestors, its own.

        Args:
            slot: alive, or committed.
            position: its depth.

        Raises:
            ProtocolViolation: it is neither.
        """
        place = self._tree.alive.get(slot)
        if place is None and position >= len(self._committed):
            raise ProtocolViolation(f"slot {slot} at position {position} is not part of the tree")
        last = self._last
        if last is not None and (position == last.position + 1 if place is None else place.parent == last.slot):
            row = self._under(last, slot, position, self._committed[position] if place is None else self._pending[slot])
        elif place is None:
            # It may be followed by others that its own window has committed too, and that it does not see.
            row = self._changed(slot, position, self._committed[position + 1 :], position + 1, -1)
        else:
            path = self._path(slot)
            row = self._changed(slot, position, path, position + 1 - len(path), 1)
        self._last = row
        return Counts(*row.table)

    def _path(self, slot: int) -> list[int]:
        """Token ids of the pending ancestors of an alive slot, from the root on, and its own."""
        path: list[int] = []
        while (place := self._tree.alive.get(slot)) is not None:
            path.append(self._pending[slot])
            slot = place.parent
        return path[::-1]

    def _under(self, last: _Row, slot: int, position: int, token: int) -> _Row:
        """The row of a child: its parent's, and its own token."""
        column = self._column.get(token, last.fresh.get(token))
        if column is None:
            column = last.fresh[token] = last.table.shape[1]
            table = np.concatenate([last.table, np.array([[token], [0], [0]], np.int64)], axis=1)
        else:
            table = last.table.copy()
        table[1, column] += 1
        table[2, column] += position >= self._prompt_tokens
        return _Row(slot, position, table, last.fresh)

    def _changed(self, slot: int, position: int, tokens: Sequence[int], start: int, sign: int) -> _Row:
        """The row of the committed text with ``tokens``, from position ``start`` on, added or taken away."""
        known = len(self._column)
        fresh: dict[int, int] = {}
        for token in tokens:
            if token not in self._column and token not in fresh:
                fresh[token] = known + len(fresh)
        table = np.zeros((3, known + len(fresh)), np.int64)
        table[:, :known] = self._table[:, :known]
        table[0, known:] = [*fresh]
        for place, token in enumerate(tokens, start):
            column = self._column.get(token, fresh.get(token))
            table[1, column] += sign
            table[2, column] += sign * (place >= self._prompt_tokens)
        return _Row(slot, position, table, fresh)

    def _count(self, token: int) -> None:
        column = self._column.setdefault(token, len(self._column))
        if column == self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
        self._table[0, column] = token
        self._table[1, column] += 1
        self._table[2, column] += len(self._committed) >= self._prompt_tokens
        self._committed.append(token)

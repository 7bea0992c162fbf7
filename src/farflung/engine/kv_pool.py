"""Which KV cell holds which token: extents of a pool, and the cells of one session inside its extent.

Pure bookkeeping, no tensors (those are ``kv_tensors``). A session's lease is one contiguous extent, so that the common case of
attention reads one slice of the pool. Keys carry their position (they are rotated when written), so the *order* of cells is
free: a commit re-indexes winners without copying, and the cells of the dead are filled again lowest first, which closes holes.
Invariants: a cell holds at most one live token; a token's cell never changes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from farflung.core.errors import LeaseExceeded, ProtocolViolation, SessionRefused
from farflung.core.tree import TokenTree
from farflung.core.window import Commit, SlotRun


class Extents:
    """Best-fit allocator of contiguous extents in ``[0, size)``: short leases fill short gaps and leave long ones whole."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)] if size > 0 else []  # (start, count), by start, never adjacent

    @property
    def free_tokens(self) -> int:
        return sum(count for _, count in self._free)

    @property
    def largest_free(self) -> int:
        """The longest that ``reserve`` would grant now."""
        return max((count for _, count in self._free), default=0)

    def reserve(self, count: int) -> int:
        """The start of ``count`` cells that are now taken. Raises SessionRefused where no free extent is that long."""
        fits = [(free, index) for index, (_, free) in enumerate(self._free) if count <= free]
        if fits:
            free, index = min(fits)
            start = self._free[index][0]
            self._free[index : index + 1] = [(start + count, free - count)] if count < free else []
            return start
        raise SessionRefused(
            f"a KV lease of {count} tokens does not fit: {self.free_tokens} of {self.size} are free, "
            f"{self.largest_free} of them in one piece",
            hint="ask for a shorter lease, wait for a session to end, or start the node with more --kv-tokens",
        )

    def release(self, start: int, count: int) -> None:
        """Gives back what ``reserve`` returned."""
        extents = sorted([*self._free, (start, count)])
        joined: list[tuple[int, int]] = []
        for first, length in extents:
            if joined and joined[-1][0] + joined[-1][1] == first:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((first, length))
        self._free = joined


@dataclass(frozen=True)
class NewRows:
    """Where the new tokens of one window went.

    Attributes:
        slots: in the order of the window's rows.
        cells: int64 [rows], offsets in the session's extent.
        positions: int64 [rows].
        is_path: each row hangs under the one before it.
    """

    slots: tuple[int, ...]
    cells: NDArray[np.int64]
    positions: NDArray[np.int64]
    is_path: bool

    def part(self, start: int, stop: int) -> NewRows:
        """Rows ``start`` to ``stop``, as if they had come by themselves after those before them."""
        if (start, stop) == (0, len(self.slots)):
            return self
        return NewRows(self.slots[start:stop], self.cells[start:stop], self.positions[start:stop], self.is_path)


class SessionCells:
    """The cells of one session. Cells are offsets in its extent of ``size`` cells.

    Attributes:
        context: positions lie below.
        tree: the session's token tree.
        position_of_cell: int64 [size], position of the token last written to each cell.
        high: no cell from here on holds a token.
    """

    def __init__(self, size: int, context: int | None = None) -> None:
        """``context`` None: no longer than the lease."""
        self.size = size
        self.context = size if context is None else context
        self.tree = TokenTree()
        self.position_of_cell: NDArray[np.int64] = np.zeros(size, np.int64)
        self.high = 0
        self._prefix: NDArray[np.int64] = np.zeros(size, np.int64)  # cell of each committed position
        self._alive: dict[int, int] = {}  # slot -> cell
        self._holes: list[int] = []  # free cells below high, sorted; high - 1 is never among them

    @property
    def free_cells(self) -> int:
        return self.size - self.tree.tokens

    @property
    def committed_cells(self) -> NDArray[np.int64]:
        """Cell of each committed position."""
        return self._prefix[: self.tree.committed_tokens]

    @property
    def alive_cells(self) -> Mapping[int, int]:
        """Cell of each alive slot."""
        return self._alive

    def apply(self, runs: Sequence[SlotRun], commit: Commit | None) -> NewRows:
        """Adds the slots of ``runs``, then commits; the dead give up their cells before the new slots take theirs.

        Raises ProtocolViolation where runs or commit break a rule, LeaseExceeded where the lease is too short or a slot lies
        beyond the context; nothing has changed then.
        """
        grown, stillborn = self.tree.add(runs)
        tree, died = (grown, frozenset[int]()) if commit is None else grown.commit(commit)
        slots = tuple(slot for run in runs for slot in range(run.first, run.first + run.count))
        dead = stillborn | died.intersection(slots)
        if dead:
            raise ProtocolViolation(f"slots {sorted(dead)} are dead and cannot be computed")
        if tree.tokens > self.size:
            raise LeaseExceeded(
                f"{tree.committed_tokens} committed and {len(tree.alive)} pending tokens exceed the KV lease of {self.size}",
                hint="open the session with a lease of prompt + max_tokens + slots in flight",
            )
        last = max((grown.alive[run.first + run.count - 1].position for run in runs), default=-1)
        if last >= self.context:  # some families look positions up in a table that ends there
            raise LeaseExceeded(f"a slot at position {last} is beyond the {self.context} tokens that the model is run for here")
        for slot in died:
            insort(self._holes, self._alive.pop(slot))
        cells = self._take(len(slots))
        self._alive.update(zip(slots, cells, strict=True))
        committed = self.tree.committed_tokens
        self.tree = tree
        if commit is not None:
            for position, slot in enumerate(commit.slots(), commit.start):
                if position >= committed:
                    self._prefix[position] = self._alive.pop(slot)
        positions = np.fromiter((grown.alive[slot].position for slot in slots), np.int64, len(slots))
        cell_array = np.array(cells, np.int64)
        self.position_of_cell[cell_array] = positions
        is_path = all(run.parent == before.first + before.count - 1 for before, run in pairwise(runs))
        return NewRows(slots, cell_array, positions, is_path)

    def slice_keys(self, rows: NewRows) -> int | None:
        """Number of leading cells that are exactly what the last of ``rows`` sees; None where holes or branches lie between.

        Of several rows it says also that they are a path in the last of these cells, in order, so that the causal triangle
        aligned to the lower right is all the mask that is needed.
        """
        count, first = len(rows.slots), int(rows.positions[0])
        keys = first + count
        if not rows.is_path or keys > self.high:
            return None
        below = self._prefix[: min(first, self.tree.committed_tokens)]
        top = max((int(below.max()) if len(below) else -1), *self._pending_above(rows.slots[0]), -1)
        if count == 1:
            return keys if max(top, int(rows.cells[0])) == keys - 1 else None
        if top >= first or not np.array_equal(rows.cells, np.arange(first, keys)):
            return None
        return keys

    def in_order(self, start: int, stop: int) -> bool:
        """Whether cell i holds position i for all i in ``[start, stop)``, cells that ``slice_keys`` has covered."""
        return np.array_equal(self.position_of_cell[start:stop], np.arange(start, stop))

    def visible(self, rows: NewRows, window: int | None = None) -> NDArray[np.bool_]:
        """bool [rows, high]: the cells each row sees: the prefix up to itself, or all of it and its pending ancestors.

        With a sliding ``window``, of these only the last ``window`` positions.
        """
        mask = np.zeros((len(rows.slots), self.high), np.bool_)
        index = {slot: i for i, slot in enumerate(rows.slots)}
        for i, (slot, cell) in enumerate(zip(rows.slots, rows.cells.tolist(), strict=True)):
            place = self.tree.alive.get(slot)
            if place is None:  # committed by the very window that brought it
                mask[i, self._prefix[: int(rows.positions[i]) + 1]] = True
                continue
            parent = index.get(place.parent)
            if parent is not None:
                mask[i] = mask[parent]
            else:
                mask[i, self.committed_cells] = True
                mask[i, self._pending_above(slot)] = True
            mask[i, cell] = True
        if window is not None:
            mask &= self.position_of_cell[None, : self.high] > rows.positions[:, None] - window
        return mask

    def _pending_above(self, slot: int) -> list[int]:
        """Cells of the alive ancestors of ``slot``."""
        cells: list[int] = []
        place = self.tree.alive.get(slot)
        while place is not None and (cell := self._alive.get(place.parent)) is not None:
            cells.append(cell)
            place = self.tree.alive.get(place.parent)
        return cells

    def _take(self, count: int) -> list[int]:
        """Free cells, lowest first: holes close before the extent grows."""
        while self._holes and self._holes[-1] == self.high - 1:
            self.high = self._holes.pop()
        taken, self._holes = self._holes[:count], self._holes[count:]
        more = count - len(taken)
        taken += range(self.high, self.high + more)
        self.high += more
        return taken

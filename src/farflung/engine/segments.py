"""What the rows of a pass see in the KV pool, and which of them one call of attention serves.

A ``Segment`` is the rows of one session. Few rows of many sessions cost less in one call than in many: each further call adds
some 15 us. Copying keys together pays at 64 keys and no longer at 256; a *view* costs nothing, and where extents begin at equal
distances in the pool one view shows them all - any two do. What pads shorter ones to the longest is masked, and lies in each
session's own lease. Attention alone of one layer, bf16, 14 query and 2 key heads, one thread of a shared machine, us for 8
sessions of 64 / 256 / 2000 keys: a call each 350 / 580 / 2670, one call on a view 165 / 460 / 2540, keys copied together 230 /
810 / 4780. Of a whole step of eight layers that is 0 to 6% at 64 and 256 keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from farflung.engine.kv_pool import NewRows, SessionCells

FOLD_ROWS = 32
"""Up to this many rows of a session, query groups are folded into rows, and sessions share calls."""
BLOCK_ROWS = 256
"""At most this many rows go through the layers at a time; longer windows go in several passes."""
MASK_CELLS = 2**23
"""Values of one mask: 32 MiB of fp32, 256 rows over 32k keys. Over more keys fewer rows go at a time."""
PAD_KEYS = 64
"""Sessions whose numbers of keys differ by more do not share a call: a masked key costs as much as a seen one."""
GROUP_CELLS = 2**18
"""Values of the mask of a shared call; where more are needed, the calls are long enough to be made one by one."""


def max_rows(keys: int) -> int:
    """Rows of a session that may meet ``keys`` cells at a time, so that no mask has more than ``MASK_CELLS`` values."""
    return max(1, min(BLOCK_ROWS, MASK_CELLS // max(1, keys)))


def causal_mask(rows: int, past: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[rows, past + rows]: 0 where seen, minus infinity elsewhere.

    Row i sees columns up to ``past + i``, in a window of W from ``past + i - W + 1`` on. Made anew for each step: 6 ms for 256
    rows over 32k keys, where the layers take seconds.
    """
    hidden = torch.full((rows, past + rows), -torch.inf, dtype=dtype)
    if window is None:
        return hidden.triu_(past + 1)
    return hidden.triu(past + 1) + hidden.tril_(past - window)


class Keys(NamedTuple):
    """What the rows of a segment meet: cells ``low <= i < high`` of the pool, under an additive mask if any."""

    low: int
    high: int
    mask: torch.Tensor | None


class Segment:
    """The rows of one session in a pass, and what they see.

    Attributes:
        start: its first row in the pass.
        rows: how many.
        limit: the first cell of the pool that is not the session's any more.
    """

    def __init__(self, start: int, base: int, rows: NewRows, cells: SessionCells, dtype: torch.dtype) -> None:
        """``start``: first row in the pass. ``base``: first cell of the session's extent in the pool. ``dtype``: of masks."""
        self.start = start
        self.rows = len(rows.slots)
        self.limit = base + cells.size
        self._base = base
        self._rows = rows
        self._cells = cells
        self._dtype = dtype
        self._first = int(rows.positions[0])
        self._last = int(rows.positions.max())
        self._slice = cells.slice_keys(rows)
        self._keys: dict[int | None, Keys] = {}

    def keys(self, window: int | None) -> Keys:
        """The same for all layers that share a window; ``window`` None: no sliding window."""
        found = self._keys.get(window)
        if found is None:
            active = None if window is not None and self._last < window else window
            found = self._keys[window] = self._plan(active)
        return found

    def _plan(self, window: int | None) -> Keys:
        low = 0 if window is None else max(0, self._first - window + 1)
        if self._slice is None or (window is not None and not self._cells.in_order(low, self._slice)):
            visible = torch.from_numpy(self._cells.visible(self._rows, window))
            columns = visible.any(0).nonzero()  # with a window, most of a long text is seen by no row
            low, high = int(columns[0]), int(columns[-1]) + 1
            hidden = visible[:, low:high].logical_not()
            mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -torch.inf)
            return Keys(self._base + low, self._base + high, mask)
        causal = None if self.rows == 1 else causal_mask(self.rows, self._first - low, window, self._dtype)
        return Keys(self._base + low, self._base + self._first + self.rows, causal)


class Group:
    """Segments of equally many rows that one call of attention serves.

    Attributes:
        rows: of each segment.
        starts: the first row in the pass of each.
        first_row: where its rows begin, if they are neighbours in order; else None.
        low: the first cell of the first one's keys.
        stride: cells from one's first key to the next one's.
        length: cells that each meets.
        mask: additive [segments, rows, length]; None: all is seen.
    """

    def __init__(self, segments: Sequence[Segment], keys: Sequence[Keys], dtype: torch.dtype) -> None:
        """Of segments that ``groups_of`` has put together; ``dtype``: of the mask."""
        self.rows = segments[0].rows
        self.starts = [segment.start for segment in segments]
        first = self.starts[0]
        in_order = self.starts == list(range(first, first + len(segments) * self.rows, self.rows))
        self.first_row = first if in_order else None
        self.low = keys[0].low
        self.stride = keys[1].low - keys[0].low if len(keys) > 1 else 0
        self.length = max(found.high - found.low for found in keys)
        self.mask = _padded(keys, self.rows, self.length, dtype)
        self._folded: dict[int, torch.Tensor | None] = {}

    @property
    def row_order(self) -> list[int]:
        """The rows of the pass that the group has, segment by segment."""
        return [row for start in self.starts for row in range(start, start + self.rows)]

    def view(self, pool: torch.Tensor) -> torch.Tensor:
        """[segments, heads, length, width] of a pool [1, heads, cells, width]; no copy."""
        if len(self.starts) == 1:
            return pool[:, :, self.low : self.low + self.length]
        _, heads, _, width = pool.shape
        _, by_head, by_cell, by_value = pool.stride()
        return pool.as_strided(
            (len(self.starts), heads, self.length, width),
            (self.stride * by_cell, by_head, by_cell, by_value),
            pool.storage_offset() + self.low * by_cell,
        )

    def folded_mask(self, each: int) -> torch.Tensor | None:
        """The mask for ``each`` query heads of a key head folded into rows: [segments, 1, each x rows, length]."""
        if self.mask is None:
            return None
        if each not in self._folded:
            self._folded[each] = self.mask.repeat(1, each, 1)[:, None]
        return self._folded[each]


class PassPlan:
    """The groups of one pass, by sliding window; the same for all layers that share one."""

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype) -> None:
        """``segments`` cover all rows of the pass, in order."""
        self._segments = segments
        self._dtype = dtype
        self._plans: dict[int | None, tuple[list[Group], torch.Tensor | None]] = {}

    def groups(self, window: int | None) -> tuple[list[Group], torch.Tensor | None]:
        """The groups, and where in their rows, put one after another, the rows of the pass are; None: in that order."""
        found = self._plans.get(window)
        if found is None:
            groups = list(groups_of(self._segments, window, self._dtype))
            order = [row for group in groups for row in group.row_order]
            is_sorted = order == list(range(len(order)))
            found = self._plans[window] = groups, None if is_sorted else torch.tensor(order).argsort()
        return found


def groups_of(segments: Sequence[Segment], window: int | None, dtype: torch.dtype) -> Iterator[Group]:
    """Puts together segments of equally many rows and about as many keys, whose keys begin at equal distances."""
    by_rows: dict[int, list[tuple[Segment, Keys]]] = {}
    for segment in segments:
        found = segment, segment.keys(window)
        if segment.rows <= FOLD_ROWS and len(segments) > 1:
            by_rows.setdefault(segment.rows, []).append(found)
        else:
            yield Group([segment], [found[1]], dtype)
    for members in by_rows.values():
        for near in _near_lengths(members):
            for run in even_runs([keys.low for _, keys in near]):
                yield Group([near[index][0] for index in run], [near[index][1] for index in run], dtype)


def even_runs(starts: Sequence[int]) -> Iterator[list[int]]:
    """Indices of ``starts`` (rising) in runs of equal distances, greedily: at least two in a run, but perhaps the last."""
    run: list[int] = []
    for index, start in enumerate(starts):
        if len(run) >= 2 and start - starts[run[-1]] != starts[run[1]] - starts[run[0]]:
            yield run
            run = []
        run.append(index)
    if run:
        yield run


def _near_lengths(members: Sequence[tuple[Segment, Keys]]) -> Iterator[list[tuple[Segment, Keys]]]:
    """Members whose keys, padded to the longest, stay within each one's lease and cost little; in order of their first key."""
    near: list[tuple[Segment, Keys]] = []
    longest = 0
    for segment, keys in sorted(members, key=lambda member: member[1].low - member[1].high):  # longest first
        length = keys.high - keys.low
        cells = (len(near) + 1) * segment.rows * longest
        if near and (longest - length > PAD_KEYS or keys.low + longest > segment.limit or cells > GROUP_CELLS):
            yield sorted(near, key=lambda member: member[1].low)
            near = []
        if not near:
            longest = length
        near.append((segment, keys))
    if near:
        yield sorted(near, key=lambda member: member[1].low)


def _padded(keys: Sequence[Keys], rows: int, length: int, dtype: torch.dtype) -> torch.Tensor | None:
    """[segments, rows, length]: what is beyond a segment's own keys is hidden."""
    if all(found.mask is None and found.high - found.low == length for found in keys):
        return None
    if len(keys) == 1 and keys[0].mask is not None:
        return keys[0].mask[None]
    mask = torch.full((len(keys), rows, length), -torch.inf, dtype=dtype)
    for own, found in zip(mask, keys, strict=True):
        own[:, : found.high - found.low] = 0.0 if found.mask is None else found.mask
    return mask

"""What a stage sent, kept until the session ends, so that a successor that lost it - or a new one - gets the same bytes again.

Codecs are lossy, so rows are kept as they were coded (rules 5 and 6). How much of it all is in memory, on disk or given up is
for the ``LogBudget`` of the node to say.

Rows stay in the chunks in which they came, with an index from slot to chunk, so a prompt is a handful of objects and what goes
out is the very object that came in. Committed positions fall in three stretches, oldest first:

    0 ... evicted ... spilled ... committed      [given up | on disk | in memory]
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from farflung.core.errors import Cancelled, LogEvicted, ProtocolViolation
from farflung.core.ids import SessionId, short
from farflung.node.page_file import Page

ROW_OVERHEAD = 300
"""Bytes that Python spends on a row that came alone, beside its data: chunk, index entry, object headers (tracemalloc: 283).
Counted for every row in memory; about half of it, not counted, stays for rows on disk."""

OnEvicted = Callable[[SessionId, int], None]
"""Told (session, complete_from) after rows were given up. It may close the log, and must not use it otherwise."""


class LogSpace(Protocol):
    """The room that the logs of a node share: ``LogBudget``."""

    @property
    def page_bytes(self) -> int: ...

    def grew(self, size: int) -> None:
        """A log has that many bytes more in memory, or fewer."""

    def fit(self) -> None:
        """Makes room where memory is over its budget."""

    def read(self, page: Page) -> bytes:
        """What was written there. Raises LogEvicted where the disk does not give it back."""

    def free(self, page: Page) -> None:
        """Nothing on it is wanted any more."""

    def forget(self, log: RowLog) -> None:
        """It is closed."""


class _Chunk:
    """Rows that came together, in memory or on a page: ``at`` gives each slot's place, in order; ``live`` of them count."""

    __slots__ = ("at", "live", "page", "rows")

    def __init__(self, at: range | dict[int, int], rows: bytes, page: Page | None) -> None:
        self.at = at
        self.rows = rows
        self.page = page
        self.live = len(at)

    def row(self, slot: int) -> int:
        at = self.at
        return slot - at.start if isinstance(at, range) else at[slot]

    @property
    def memory(self) -> int:
        return len(self.rows) + ROW_OVERHEAD * len(self.at)


def _places(slots: Sequence[int]) -> range | dict[int, int]:
    """Each slot's place in ``slots``: a range where they follow each other, as they nearly always do."""
    run = range(slots[0], slots[0] + len(slots))
    return run if _same(slots, run) else {slot: row for row, slot in enumerate(slots)}


def _same(slots: Sequence[int], at: range | dict[int, int]) -> bool:
    return len(slots) == len(at) and (slots == at or tuple(slots) == tuple(at))


class RowLog:
    """The log of one session, made by ``LogBudget.open``. Slots may be any sequence; a ``range`` is quickest.

    Attributes:
        complete_from: every committed row from this position on is here; 0 while nothing was given up.
        memory: bytes held in memory.
    """

    def __init__(self, space: LogSpace, session: SessionId, on_evicted: OnEvicted) -> None:
        self.session = session
        self.on_evicted = on_evicted
        self.complete_from = 0
        self.memory = 0
        self.pages: set[Page] = set()
        self._space = space
        self._index: dict[int, _Chunk] = {}
        self._path = array("i")  # committed slots by position; they grow along it, for a child's slot is the greater
        self._spilled = 0
        self._row_bytes = 0
        self._closed = False

    def append(self, slots: Sequence[int], rows: bytes | memoryview) -> None:
        """Keeps rows of equal size, one per slot.

        Slots may be committed already or not yet. ``bytes`` are kept as they are, a view is copied (it may pin a whole frame).
        Raises ProtocolViolation where a slot is here already or sizes do not fit, Cancelled after ``close``.
        """
        count = len(slots)
        if self._closed:
            raise Cancelled(f"session {short(self.session)} is over and its log is closed")
        if not count:
            return
        rows = bytes(rows)
        row_bytes = self._row_bytes or len(rows) // count
        if not rows or len(rows) != count * row_bytes:
            raise ProtocolViolation(f"{count} rows came with {len(rows)} bytes; the log has rows of {row_bytes} bytes")
        at = _places(slots)
        if len(at) != count or not self._index.keys().isdisjoint(at):
            raise ProtocolViolation(f"slots {slots[0]}..{slots[-1]} of session {short(self.session)} were logged twice")
        self._row_bytes = row_bytes
        chunk = _Chunk(at, rows, None)
        for slot in at:
            self._index[slot] = chunk
        self._grow(chunk.memory)
        if self.complete_from:
            last = self._path[self.complete_from - 1]  # given up or dead: nobody can ask for rows up to here
            self.drop([slot for slot in slots if slot <= last])
        self._space.fit()

    def commit(self, slots: Sequence[int]) -> None:
        """These slots are committed, at the positions after the last commit; their rows may come later."""
        self._path.extend(slots)
        self._space.fit()

    def drop(self, slots: Iterable[int]) -> None:
        """These slots are dead, so never committed ones: frees what is here of them, passes over those that are not."""
        pop = self._index.pop
        self._released(chunk for slot in slots if (chunk := pop(slot, None)) is not None)

    def holds(self, slots: Iterable[int]) -> bool:
        """Whether the rows of all these slots are here."""
        return all(slot in self._index for slot in slots)

    def payload(self, slots: Sequence[int]) -> bytes:
        """The rows of these slots, joined in this order; the very object that was appended where exactly that is asked for.

        Raises LogEvicted where one is not here, or is on a disk that does not give back what was written: everything up to it
        is then given up.
        """
        chunk = self._index.get(slots[0]) if slots else None
        if chunk is not None and chunk.page is None and chunk.live == len(chunk.at) and _same(slots, chunk.at):
            return chunk.rows
        return self._join(slots)

    def close(self) -> None:
        """Frees everything. May be called more than once."""
        self._closed = True
        self._index.clear()
        self._grow(-self.memory)
        for page in self.pages:
            self._space.free(page)
        self.pages.clear()
        self._space.forget(self)

    # -- for the budget ----------------------------------------------------------------------------------------------

    @property
    def has_spillable(self) -> bool:
        """Whether there are committed rows in memory."""
        return self._spilled < len(self._path) and self._path[self._spilled] in self._index

    def oldest_in_memory(self, limit: int) -> array[int]:
        """The oldest committed slots in memory, as many as fit ``limit`` bytes."""
        count = limit // self._row_bytes
        oldest = self._path[self._spilled : self._spilled + count]
        missing = next((at for at, slot in enumerate(oldest) if slot not in self._index), len(oldest))
        return oldest[:missing]

    def moved(self, slots: Sequence[int], page: Page) -> None:
        """These oldest rows are on that page now."""
        chunk = _Chunk(_places(slots), b"", page)
        before = [self._index[slot] for slot in slots]
        for slot in slots:
            self._index[slot] = chunk
        self.pages.add(page)
        self._spilled += len(slots)
        self._released(before)

    def evict_oldest(self) -> None:
        """Gives up the oldest page, or without one as many rows in memory. The caller tells ``on_evicted``."""
        slots = self._path[self.complete_from : self.complete_from + 1]
        chunk = self._index.get(slots[0]) if slots else None
        if chunk is not None and chunk.page is not None:
            self._evict_through(next(reversed(chunk.at)))
        else:
            oldest = self.oldest_in_memory(self._space.page_bytes) or slots
            self._evict_through(oldest[-1])

    # -- inside ------------------------------------------------------------------------------------------------------

    def _join(self, slots: Sequence[int]) -> bytes:
        size, parts = self._row_bytes, list[memoryview]()
        for chunk, first, stop in self._stretches(slots):
            data = chunk.rows if chunk.page is None else self._read(chunk, chunk.page)
            parts.append(memoryview(data)[first * size : stop * size])
        return b"".join(parts)

    def _stretches(self, slots: Sequence[int]) -> Iterator[tuple[_Chunk, int, int]]:
        """(chunk, first row, row after the last) of each stretch of slots that lies together."""
        current: _Chunk | None = None
        first = stop = 0
        for slot in slots:
            chunk = self._index.get(slot)
            if chunk is None:
                raise LogEvicted(
                    f"the row of slot {slot} is not in the log of session {short(self.session)}, "
                    f"which is complete from position {self.complete_from} on",
                    hint="rebuild from the nearest stage before this one whose log is complete",
                )
            row = chunk.row(slot)
            if chunk is current and row == stop:
                stop += 1
                continue
            if current is not None:
                yield current, first, stop
            current, first, stop = chunk, row, row + 1
        if current is not None:
            yield current, first, stop

    def _read(self, chunk: _Chunk, page: Page) -> bytes:
        try:
            return self._space.read(page)
        except LogEvicted:
            self._evict_through(next(reversed(chunk.at)))
            self.on_evicted(self.session, self.complete_from)
            raise

    def _evict_through(self, slot: int) -> None:
        """Gives up the committed rows up to and including that slot."""
        stop = bisect_right(self._path, slot)
        self.drop(self._path[self.complete_from : stop])
        self.complete_from = stop
        self._spilled = max(self._spilled, stop)

    def _released(self, chunks: Iterable[_Chunk]) -> None:
        """One row of each chunk, per time it is named, is no longer here: frees what that leaves useless."""
        touched: dict[_Chunk, None] = {}
        for chunk in chunks:
            chunk.live -= 1
            touched[chunk] = None
        for chunk in touched:
            if chunk.page is not None:
                if not chunk.live:
                    self.pages.discard(chunk.page)
                    self._space.free(chunk.page)
            elif not chunk.live:
                self._grow(-chunk.memory)
            elif 2 * chunk.live < len(chunk.at):
                self._compact(chunk)

    def _compact(self, chunk: _Chunk) -> None:
        """Leaves only live rows in a chunk of which more than half are not."""
        self._grow(-chunk.memory)
        live = [slot for slot in chunk.at if self._index.get(slot) is chunk]
        chunk.rows = self._join(live)
        chunk.at = _places(live)
        self._grow(chunk.memory)

    def _grow(self, size: int) -> None:
        self.memory += size
        self._space.grew(size)

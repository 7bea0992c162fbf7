"""Slots, commits and windows: how pieces of the token tree are named on the wire (DESIGN.md, "The token tree").

Slots are integers that the driver hands out in order and never reuses in a session, so a child's slot is always greater
than its parent's. Paths are runs: a prompt chunk of 256 tokens is one run, not 256 numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct

from farflung.core.errors import ProtocolViolation

NO_SLOT = -1
"""The parent of position 0."""

MAX_SLOT = 2**31 - 1


class SlotSpan(Struct, frozen=True, array_like=True):
    """Slots ``first, first + 1, ..., first + count - 1``. Raises ProtocolViolation out of range."""

    first: int
    count: int

    def __post_init__(self) -> None:
        if not (self.first >= 0 and self.count > 0 and self.first + self.count <= MAX_SLOT):
            raise ProtocolViolation(f"slots {self.first}+{self.count} are out of range")

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.first + self.count))


class SlotRun(Struct, frozen=True, array_like=True):
    """A path of new slots: the first hangs under ``parent``, each other one under the one before it."""

    first: int
    count: int
    parent: int

    def __post_init__(self) -> None:
        if not (NO_SLOT <= self.parent < self.first and self.count > 0 and self.first + self.count <= MAX_SLOT):
            raise ProtocolViolation(f"slot run {self.first}+{self.count} under {self.parent} is out of range")

    @property
    def last(self) -> int:
        return self.first + self.count - 1

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(slot, parent) for each slot of the run."""
        parent = self.parent
        for slot in range(self.first, self.first + self.count):
            yield slot, parent
            parent = slot


class Commit(Struct, frozen=True, array_like=True):
    """The committed path from position ``start`` on: the slots there, in order. The last one is the new root."""

    start: int
    spans: tuple[SlotSpan, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.start <= MAX_SLOT:
            raise ProtocolViolation(f"a commit at position {self.start} is out of range")

    @property
    def count(self) -> int:
        return sum(span.count for span in self.spans)

    @property
    def stop(self) -> int:
        """Committed length after this commit."""
        return self.start + self.count

    def slots(self) -> Iterator[int]:
        for span in self.spans:
            yield from span


def spans_of(slots: Iterable[int]) -> tuple[SlotSpan, ...]:
    """Fewest spans that name ``slots`` in the given order."""
    spans: list[tuple[int, int]] = []
    for slot in slots:
        if spans and spans[-1][0] + spans[-1][1] == slot:
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((slot, 1))
    return tuple(SlotSpan(first, count) for first, count in spans)

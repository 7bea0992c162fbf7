"""The token tree of one session, as a value: committed path, alive slots, everything else dead.

Invariants: positions are depths; a child's slot is greater than its parent's; the alive are exactly the descendants of the
root (the last committed slot), so their slots are greater than the root's; a slot once dead never comes back. Used by the
stage, the driver and the KV pool alike.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from msgspec import Struct, field
from msgspec.structs import replace

from farflung.core.errors import ProtocolViolation
from farflung.core.window import NO_SLOT, Commit, SlotRun, SlotSpan, spans_of

MAX_OVERLAP = 4096
"""A commit may repeat that much of what is committed: nobody needs more, and comparing costs time."""


class Place(NamedTuple):
    """Where an alive slot hangs."""

    parent: int
    position: int


class TokenTree(Struct, frozen=True):
    """Attributes:
    committed: spans of the committed path, by position.
    committed_tokens: its length in tokens.
    root: the last committed slot, ``NO_SLOT`` before the first commit.
    alive: slots not committed yet; parents come before their children.
    dead: the slots above the root that are known to be dead.
    next_slot: the least slot above all that were seen, or are known to have died on their way.
    """

    committed: tuple[SlotSpan, ...] = ()
    committed_tokens: int = 0
    root: int = NO_SLOT
    alive: Mapping[int, Place] = field(default_factory=lambda: MappingProxyType({}))
    dead: frozenset[int] = frozenset()
    next_slot: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that hold KV: committed and alive. What a lease counts."""
        return self.committed_tokens + len(self.alive)

    def position_of(self, slot: int) -> int | None:
        """Position of the root or an alive slot; None of any other."""
        if slot == self.root:
            return self.committed_tokens - 1
        place = self.alive.get(slot)
        return None if place is None else place.position

    def knows(self, slot: int) -> bool:
        """Whether ``slot`` was seen, or can only be dead: below the root nothing new can be alive."""
        return slot <= self.root or slot in self.alive or slot in self.dead

    def holds(self, slot: int) -> bool:
        """Whether ``slot`` is committed or alive."""
        if slot > self.root:
            return slot in self.alive
        index = bisect_right(self.committed, slot, key=_first) - 1
        return index >= 0 and slot < self.committed[index].first + self.committed[index].count

    def add(self, runs: Iterable[SlotRun]) -> tuple[TokenTree, frozenset[int]]:
        """The tree with new slots, and which of them are dead on arrival (their parent is dead).

        Raises ProtocolViolation where a slot is known already or a parent was never announced.
        """
        runs = tuple(runs)
        if not runs:
            return self, frozenset()
        alive = dict(self.alive)
        dead: set[int] = set()
        next_slot = self.next_slot
        for run in runs:
            parent = run.parent
            for slot in range(run.first, run.first + run.count):
                if slot in alive or slot <= self.root or slot in dead or slot in self.dead:
                    raise ProtocolViolation(f"slot {slot} was used before")
                if parent == self.root:
                    alive[slot] = Place(parent, self.committed_tokens)
                elif parent in alive:
                    alive[slot] = Place(parent, alive[parent].position + 1)
                elif parent < self.root or parent in dead or parent in self.dead:
                    dead.add(slot)
                else:
                    raise ProtocolViolation(f"slot {slot} hangs under slot {parent}, which was never announced")
                parent = slot
            next_slot = max(next_slot, run.first + run.count)
        tree = replace(self, alive=MappingProxyType(alive), next_slot=next_slot)
        return (replace(tree, dead=self.dead | dead) if dead else tree), frozenset(dead)

    def commit(self, commit: Commit) -> tuple[TokenTree, frozenset[int]]:
        """The tree after ``commit``, and the slots that died by it.

        Overlap with what is committed must agree; new slots must follow the root one under another.
        Raises ProtocolViolation otherwise.
        """
        if commit.start > self.committed_tokens:
            raise ProtocolViolation(
                f"a commit starts at position {commit.start}, but only {self.committed_tokens} tokens are committed"
            )
        if commit.start < self.committed_tokens - MAX_OVERLAP:
            raise ProtocolViolation(f"a commit starts at position {commit.start}, long before {self.committed_tokens}")
        slots = list(commit.slots())
        overlap = min(len(slots), self.committed_tokens - commit.start)
        if overlap and spans_of(slots[:overlap]) != self.committed_between(commit.start, commit.start + overlap):
            raise ProtocolViolation(f"a commit at position {commit.start} contradicts what is committed already")
        fresh = slots[overlap:]
        if not fresh:
            return self, frozenset()
        root = self.root
        for slot in fresh:
            place = self.alive.get(slot)
            if place is None or place.parent != root:
                raise ProtocolViolation(f"a commit names slot {slot}, which does not hang under slot {root}")
            root = slot
        alive: dict[int, Place] = {}
        for slot, place in self.alive.items():  # parents come before their children
            if place.parent == root or place.parent in alive:
                alive[slot] = place
        died = frozenset(self.alive.keys() - alive.keys() - set(fresh))
        dead = self.dead | died
        return (
            replace(
                self,
                committed=_join(self.committed, spans_of(fresh)),
                committed_tokens=self.committed_tokens + len(fresh),
                root=root,
                alive=MappingProxyType(alive),
                dead=frozenset(slot for slot in dead if slot > root) if dead else dead,
            ),
            died,
        )

    def commit_from(self, start: int, stop: int | None = None) -> Commit | None:
        """The commit that takes a tree with ``start`` committed tokens to the first ``stop`` (None: all) of this one's; None
        where there is nothing to tell."""
        stop = self.committed_tokens if stop is None else stop
        return Commit(start, self.committed_between(start, stop)) if start < stop else None

    def committed_between(self, start: int, stop: int) -> tuple[SlotSpan, ...]:
        """Slots of the committed positions ``start`` to ``stop``, in order."""
        found: list[SlotSpan] = []
        position = self.committed_tokens
        for span in reversed(self.committed):  # what is asked for lies near the end: the path is long, a commit short
            if position <= start:
                break
            position -= span.count
            low, high = max(start, position), min(stop, position + span.count)
            if low < high:
                found.append(SlotSpan(span.first + low - position, high - low))
        return tuple(reversed(found))


def _first(span: SlotSpan) -> int:
    return span.first


def _join(left: tuple[SlotSpan, ...], right: tuple[SlotSpan, ...]) -> tuple[SlotSpan, ...]:
    if left and right and left[-1].first + left[-1].count == right[0].first:
        return (*left[:-1], SlotSpan(left[-1].first, left[-1].count + right[0].count), *right[1:])
    return left + right

"""Windows as values: taking rows out of them, cutting them, and making them anew from a tree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import NamedTuple

from msgspec.structs import replace

from farflung.core.messages import Have, Window
from farflung.core.tree import TokenTree
from farflung.core.window import Commit, SlotRun, spans_of
from farflung.protocol.limits import MAX_WINDOW_ROWS

REPLAY_ROWS = 256
"""Rows of one window made anew: a prompt chunk's size, so that stages work on several at once."""


def pairs_of(window: Window) -> Iterator[tuple[int, int]]:
    """(slot, parent) of each row."""
    for run in window.runs:
        yield from run.pairs()


def slots_of(window: Window) -> list[int]:
    """The slot of each row."""
    return [slot for run in window.runs for slot in range(run.first, run.first + run.count)]


def runs_of(pairs: Collection[tuple[int, int]]) -> tuple[SlotRun, ...]:
    """Fewest runs that name slots and parents in the given order."""
    runs: list[list[int]] = []
    for slot, parent in pairs:
        if runs and parent == slot - 1 == runs[-1][0] + runs[-1][1] - 1:
            runs[-1][1] += 1
        else:
            runs.append([slot, 1, parent])
    return tuple(SlotRun(*run) for run in runs)


def keep_rows(window: Window, kept: Callable[[int], bool]) -> tuple[Window, list[int] | None]:
    """The window with only the rows whose slot is ``kept``, and their places in it; None for the places where that is all of
    them. Even with no row left the window travels on as a header (rule 1)."""
    pairs = list(pairs_of(window))
    places = [place for place, (slot, _) in enumerate(pairs) if kept(slot)]
    if len(places) == len(pairs):
        return window, None
    remaining = [pairs[place] for place in places]
    slots = {slot for slot, _ in remaining}
    want = spans_of(slot for span in window.want for slot in span if slot in slots)
    return replace(window, runs=runs_of(remaining), want=want), places


def is_committed_path(window: Window) -> bool:
    """Whether the window's rows are exactly what its commit names: a prompt chunk, or a committed prefix that is sent again.
    Only such a window may be cut in two."""
    return window.commit is not None and window.rows > 1 and list(window.commit.slots()) == slots_of(window)


def cut(window: Window, rows: int) -> tuple[Window, Window]:
    """The first ``rows`` rows of a committed path as one window, the rest as another."""
    pairs = list(pairs_of(window))
    start = 0 if window.commit is None else window.commit.start
    parts = []
    for begin, some in ((0, pairs[:rows]), (rows, pairs[rows:])):
        slots = [slot for slot, _ in some]
        members = set(slots)
        want = spans_of(slot for span in window.want for slot in span if slot in members)
        parts.append(replace(window, runs=runs_of(some), want=want, commit=Commit(start + begin, spans_of(slots))))
    first, rest = parts
    return replace(first, next_slot=min(first.next_slot, pairs[rows][0])), rest


class Given(NamedTuple):
    """What a sender can give to the next stage.

    Attributes:
        tree: of the rows that it has.
        latest: the newest tree: what is dead there need not go out.
        wanted: slots whose answers are wanted.
    """

    tree: TokenTree
    latest: TokenTree
    wanted: frozenset[int]


def missing(given: Given, have: Have) -> list[Window]:
    """The windows that bring a receiver from its ``have`` to what the sender can give, parents first.

    The committed prefix comes in chunks that commit themselves, then the alive slots. Where the last of these wants no answer a
    header follows, so that what has gone out is acknowledged all the same.
    """
    tree, held = given.tree, {slot for span in have.slots for slot in span}
    windows: list[Window] = []

    def add(pairs: list[tuple[int, int]], commit: Commit | None) -> None:
        want = spans_of(slot for slot, _ in pairs if slot in given.wanted)
        windows.append(Window(have.epoch, runs_of(pairs), want, commit))

    position, done = have.committed_tokens, have.committed_tokens
    committed = (slot for span in tree.committed_between(position, tree.committed_tokens) for slot in span)
    parent = next(iter(tree.committed_between(position - 1, position))).first if 0 < position <= tree.committed_tokens else -1
    while chunk := list(islice(committed, REPLAY_ROWS)):
        pairs = []
        for slot in chunk:
            if slot not in held:
                pairs.append((slot, parent))
            parent = slot
        position += len(chunk)
        add(pairs, tree.commit_from(done, position))
        done = position
    alive = [(slot, place.parent) for slot, place in tree.alive.items() if slot not in held and given.latest.holds(slot)]
    for start in range(0, len(alive), MAX_WINDOW_ROWS):
        add(alive[start : start + MAX_WINDOW_ROWS], None)
    if not windows or not windows[-1].want:
        add([], None)
    windows[-1] = replace(windows[-1], next_slot=given.tree.next_slot)
    return windows

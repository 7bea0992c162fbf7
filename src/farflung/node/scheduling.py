"""Which windows go into the next step, and how much of each prompt. Pure.

Decode goes before prefill, interactive before batch. While interactive sessions decode, a step is kept within a bound on its
time, from the node's own T-curve, so that a prompt slows them by a stated factor at most; what of the bound decode leaves is
filled with prompt rows. Batch sessions fill what is left beside decode, but beside interactive prompts they have only a share:
a fuller step would delay these. None starves: whenever prompts wait, some rows of one go along, and whenever batch sessions
wait, one of theirs. Among equals the longest waiting goes first; who got something waits anew, so that they take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farflung.core.ids import SessionId
from farflung.planning.curve import time_ms, tokens_within


@dataclass(frozen=True)
class Waiting:
    """The oldest window of one session that is not computed yet.

    Attributes:
        session: whose.
        rows: of the window.
        is_decode: its session waits for it token by token.
        is_batch: its session can wait.
        is_whole: it may not be cut; decode never is. A large piece of a token tree is such a one: whole, in a prompt's turn.
    """

    session: SessionId
    rows: int
    is_decode: bool
    is_batch: bool = False
    is_whole: bool = False


@dataclass(frozen=True)
class Chosen:
    """The first ``rows`` rows of a session's oldest window."""

    session: SessionId
    rows: int


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a step may take.

    Attributes:
        curve_ms: the node's T-curve, (rows, milliseconds), rows rising; empty: not measured.
        max_rows: of a step, unless a single window is larger.
        slowdown: a step in which interactive sessions decode may take so many times what their decode alone takes ...
        slack_ms: ... or so much longer, whichever is more: where decode takes 2 ms, prompts need not creep.
        least_rows: rows of a waiting prompt that go along whatever they cost.
        batch_share: of the rows that decode leaves, what part batch sessions have beside interactive prompts.
    """

    curve_ms: tuple[tuple[int, float], ...] = ()
    max_rows: int = 256
    slowdown: float = 2.0
    slack_ms: float = 10.0
    least_rows: int = 16
    batch_share: float = 0.125


def choose_batch(waiting: Sequence[Waiting], pace: Pace, decoding_rows: int = 0) -> list[Chosen]:
    """What is computed in the next step; empty only where nothing waits.

    Args:
        waiting: in order of arrival, one per session.
        pace: see there.
        decoding_rows: rows that interactive sessions decode at a time, as seen lately: some that do not wait now will soon, and
            must not find the node busy with a long step.
    """
    interactive = [item for item in waiting if not item.is_batch]
    batch = [item for item in waiting if item.is_batch]
    first = _decodes(interactive, pace.max_rows)
    rows = sum(item.rows for item in first)
    room = room_for_others(pace, rows, max(rows, decoding_rows))
    kept = max(1, int(room * pace.batch_share)) if batch else 0
    prompts = _prefills(interactive, room - kept, pace.least_rows)
    others = _batch(batch, kept if prompts else room) if batch else []
    return [*first, *prompts, *others]


def room_for_others(pace: Pace, rows: int, decoding_rows: int) -> int:
    """Rows that fit in a step beside ``rows`` of interactive decode, where ``decoding_rows`` set the pace; may be 0."""
    room = pace.max_rows - rows
    if decoding_rows > 0 and pace.curve_ms:
        alone_ms = time_ms(pace.curve_ms, decoding_rows)
        bound_ms = max(alone_ms * pace.slowdown, alone_ms + pace.slack_ms)
        room = min(room, tokens_within(pace.curve_ms, bound_ms) - rows)
    return max(0, room)


def _decodes(waiting: Sequence[Waiting], room: int) -> list[Chosen]:
    """Windows that must be computed whole, as far as there is room; the oldest in any case."""
    chosen: list[Chosen] = []
    for item in waiting:
        if item.is_decode and (not chosen or item.rows <= room):
            chosen.append(Chosen(item.session, item.rows))
            room -= item.rows
    return chosen


def _prefills(waiting: Sequence[Waiting], room: int, least_rows: int) -> list[Chosen]:
    """Prompt chunks, cut to the room; ``least_rows`` of the oldest in any case, or all where it may not be cut."""
    chosen: list[Chosen] = []
    room = max(room, least_rows)
    for item in waiting:
        if item.is_decode or room <= 0 or (item.is_whole and item.rows > room and chosen):
            continue
        chosen.append(Chosen(item.session, item.rows if item.is_whole else min(item.rows, room)))
        room -= item.rows
    return chosen


def _batch(waiting: Sequence[Waiting], room: int) -> list[Chosen]:
    """Nobody watches these: decode first, since that ends sessions, but prompts keep a quarter."""
    kept = max(1, room // 4) if any(not item.is_decode for item in waiting) else 0
    chosen = _decodes(waiting, room - kept)
    return chosen + _prefills(waiting, room - sum(item.rows for item in chosen), kept)

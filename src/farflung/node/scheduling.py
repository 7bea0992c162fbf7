"""Which windows go into the next step. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from farflung.core.ids import SessionId


@dataclass(frozen=True)
class Waiting:
    """The oldest window of one session that is not computed yet."""

    session: SessionId
    rows: int
    is_decode: bool


def choose_batch(waiting: Sequence[Waiting], max_rows: int) -> list[SessionId]:
    """The sessions whose oldest window is computed in the next step.

    Args:
        waiting: in order of arrival.
        max_rows: bound on the rows of one step, so that a long prompt never holds up a decode for longer than that.

    Decode goes before prefill; within a kind the oldest goes first; one window always goes, however large.
    """
    chosen: list[SessionId] = []
    rows = 0
    for item in sorted(waiting, key=lambda item: not item.is_decode):
        if chosen and rows + item.rows > max_rows:
            break
        chosen.append(item.session)
        rows += item.rows
    return chosen

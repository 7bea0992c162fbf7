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
        max_rows: rows that decode may fill, and further prefill as far as there is room.

    Decode goes first, oldest first. The oldest prefill always goes along, so that neither kind starves the other: a running
    session is delayed by one prompt chunk per step at most.
    """
    decode = [item for item in waiting if item.is_decode]
    prefill = [item for item in waiting if not item.is_decode]
    chosen: list[SessionId] = []
    rows = 0
    for item in decode:
        if not chosen or rows + item.rows <= max_rows:
            chosen.append(item.session)
            rows += item.rows
    for index, item in enumerate(prefill):
        if index == 0 or rows + item.rows <= max_rows:
            chosen.append(item.session)
            rows += item.rows
    return chosen

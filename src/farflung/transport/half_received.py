"""How much a node keeps of frames that are not whole yet, on all its links together."""

from __future__ import annotations

from typing import Protocol

from farflung.core.errors import FarflungError, LinkOverloaded
from farflung.core.ids import NodeId, short
from farflung.core.units import Bytes


class Receiver(Protocol):
    """A link as the budget sees it."""

    @property
    def peer(self) -> NodeId: ...

    def end(self, error: FarflungError) -> None:
        """Ends the link at once; it reports that it holds nothing."""


class HalfReceived:
    """The budget of one node. Over it the link that holds most is ended, so that a stranger who fills it ends his own.

    Args:
        limit: bytes; passed by at most what one read brings.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[Receiver, int] = {}
        self._total = 0

    def report(self, link: Receiver, size: int) -> None:
        """The link now holds ``size`` bytes of frames that are not whole."""
        self._total += size - self._held.pop(link, 0)
        if size:
            self._held[link] = size
        if self._total > self._limit:
            most = max(self._held, key=self._held.__getitem__)
            most.end(
                LinkOverloaded(
                    f"{Bytes(self._total)} of frames that are not whole have come from {len(self._held)} links, at most "
                    f"{Bytes(self._limit)} may; node {short(most.peer)} has sent most of it"
                )
            )

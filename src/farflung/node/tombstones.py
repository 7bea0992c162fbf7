"""How sessions ended, for those who come late: an owner's line learns the reason, and nobody opens a session twice."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from farflung.core.ids import SessionId
from farflung.core.messages import Fault


class Tombstone(NamedTuple):
    """The session ended here in that epoch of this stage, by that fault if any; only a later epoch may open it again."""

    epoch: int
    fault: Fault | None


class Tombstones:
    """The last ``limit`` ended sessions."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_session: OrderedDict[SessionId, Tombstone] = OrderedDict()

    def find(self, session: SessionId) -> Tombstone | None:
        return self._by_session.get(session)

    def bury(self, session: SessionId, epoch: int, fault: Fault | None) -> None:
        """The first end in an epoch is the one that is remembered."""
        known = self._by_session.get(session)
        if known is None or known.epoch < epoch:
            self._by_session[session] = Tombstone(epoch, fault)
        while len(self._by_session) > self._limit:
            self._by_session.popitem(last=False)

    def raise_from(self, session: SessionId) -> None:
        """It is open again."""
        self._by_session.pop(session, None)

"""Owners' lines whose session has not been opened yet: the opening comes through the other stages."""

from __future__ import annotations

import asyncio

from farflung.core.errors import FarflungError
from farflung.core.ids import NodeId, SessionId
from farflung.core.messages import Close, Fault
from farflung.node.quotas import Quotas, check_waiting
from farflung.transport.lines import Line, try_send
from farflung.transport.link import Frame


class WaitingOwners:
    """Bounded in number by ``quotas`` and in time by ``wait_s``."""

    def __init__(self, quotas: Quotas, wait_s: float) -> None:
        self._quotas = quotas
        self._wait_s = wait_s
        self._waiting: dict[tuple[SessionId, NodeId], _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, session: SessionId, line: Line) -> None:
        """A later line of the same owner takes the place of the earlier one. Raises SessionRefused over the quotas."""
        self.take(session, line.peer)
        of_peer = sum(owner == line.peer for _, owner in self._waiting)
        check_waiting(self._quotas, line.peer, of_peer=of_peer, of_all=len(self._waiting))
        self._waiting[session, line.peer] = _Waiting(self, session, line, self._wait_s)

    def take(self, session: SessionId, owner: NodeId) -> Line | None:
        """The owner's line, if it waits; it does no more."""
        waiting = self._waiting.pop((session, owner), None)
        return None if waiting is None else waiting.let_go()

    def refuse(self, session: SessionId, owner: NodeId, fault: Fault) -> None:
        """Tells the owner, if its line waits, why the session is not opened."""
        try_send(self.take(session, owner), fault)

    def close(self) -> None:
        for session, owner in list(self._waiting):
            self.take(session, owner)


class _Waiting:
    """One of them, until it is taken, lost or overdue."""

    def __init__(self, owners: WaitingOwners, session: SessionId, line: Line, wait_s: float) -> None:
        self._owners = owners
        self._session = session
        self._line = line
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._overdue)
        line.bind(self)

    def let_go(self) -> Line:
        self._timer.cancel()
        self._line.release()
        return self._line

    def on_frame(self, line: Line, frame: Frame) -> None:
        """Only a close, or a sign of life, can come before the session is open."""
        if isinstance(frame.message, Close):
            self._owners.take(self._session, line.peer)

    def on_lost(self, line: Line, error: FarflungError) -> None:
        self._owners.take(self._session, line.peer)

    def _overdue(self) -> None:
        try_send(self._owners.take(self._session, self._line.peer), Close("the session was not opened in time"))

"""The sessions of one node: who may open one, who has one, and how the last ones ended.

An opening that cannot be served is answered by a fault to whoever brought it, and remembered as a tombstone, so that the
owner's own line - which may arrive later - learns the reason too, and late windows are swallowed.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from farflung.core.errors import DeadlineExceeded, FarflungError, ProtocolViolation, SessionRefused, StageLost
from farflung.core.ids import NodeId, SessionId, short
from farflung.core.messages import Attach, Close, Fault, Open, OpenText
from farflung.engine.backend import SessionSpec, StageBackend
from farflung.identity.keys import verify
from farflung.node.stage_session import Opening, StageSession, fault_of
from farflung.protocol.opening import OPEN_CONTEXT, check_open, decode_open_text
from farflung.transport.lines import Line, LinkPool, try_send
from farflung.transport.link import Frame


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Quotas and times.

    Attributes:
        codecs: what this node speaks between stages.
        max_sessions: open at a time, in all.
        max_sessions_per_owner: of one driver.
        max_waiting_owners_per_peer: owner lines whose session has not been opened yet.
        owner_wait_s: how long an owner's line waits for its session, and a session for its owner's line.
        idle_timeout_s: a session that gets no window for that long ends: KV is not to be held by heartbeats alone.
        tombstones: ended sessions remembered.
    """

    codecs: frozenset[str] = frozenset({"fp32", "bf16", "int8"})
    max_sessions: int = 256
    max_sessions_per_owner: int = 64
    max_waiting_owners_per_peer: int = 256
    owner_wait_s: float = 10.0
    idle_timeout_s: float = 120.0
    tombstones: int = 4096


class SessionTable:
    """Keeps ``StageSession``s by id and implements ``SessionHost`` for them.

    Args:
        config: see above.
        node_id: this node.
        backend: holds the KV.
        pool: the node's links.
        clock: wall clock, seconds since 1970.
        connect: runs ``StageSession.connect`` in a task that the node owns.
    """

    def __init__(
        self,
        config: TableConfig,
        node_id: NodeId,
        backend: StageBackend,
        pool: LinkPool,
        *,
        clock: Callable[[], float],
        connect: Callable[[StageSession], None],
    ) -> None:
        self._config = config
        self._node_id = node_id
        self._backend = backend
        self._clock = clock
        self._connect = connect
        self.pool = pool
        self._sessions: dict[SessionId, StageSession] = {}
        self._timers: dict[SessionId, asyncio.TimerHandle] = {}
        self._waiting_owners: dict[tuple[SessionId, NodeId], WaitingOwner] = {}
        self._tombstones: OrderedDict[SessionId, Fault | None] = OrderedDict()
        self._ready: dict[SessionId, StageSession] = {}
        self.draining = False
        self.wake = asyncio.Event()
        self.empty = asyncio.Event()
        self.empty.set()

    # -- SessionHost -------------------------------------------------------------------------------------------------

    @property
    def node_id(self) -> NodeId:
        return self._node_id

    @property
    def vocab_size(self) -> int:
        return self._backend.spec.vocab_size

    @property
    def hidden_size(self) -> int:
        return self._backend.spec.hidden_size

    def ready(self, session: StageSession) -> None:
        self._ready.setdefault(session.id, session)
        self.wake.set()

    def ended(self, session: StageSession, fault: Fault | None) -> None:
        del self._sessions[session.id]
        self._ready.pop(session.id, None)
        self._timers.pop(session.id).cancel()
        self._backend.close(session.id)
        self._bury(session.id, fault)
        if not self._sessions:
            self.empty.set()

    # -- for the node ------------------------------------------------------------------------------------------------

    @property
    def sessions(self) -> list[StageSession]:
        return list(self._sessions.values())

    @property
    def ready_sessions(self) -> list[StageSession]:
        """Those with a window to compute, in order of arrival."""
        return list(self._ready.values())

    @property
    def queue_rows(self) -> int:
        """Rows that are not computed yet, of all sessions."""
        return sum(pending.window.rows for session in self._sessions.values() for pending in session.state.queue)

    @property
    def waiting_owners(self) -> int:
        return len(self._waiting_owners)

    def taken(self, session: StageSession) -> None:
        """Its window went into a step."""
        self._ready.pop(session.id, None)

    def on_new_line(self, line: Line, frame: Frame) -> None:
        """A frame on a channel that no session holds. Anything but an opening is late and dropped."""
        match frame.message:
            case Open():
                self._open(line, frame.message)
            case Attach():
                self._attach(line, frame.message)
            case _:
                return

    def end_all(self, error: FarflungError) -> None:
        for session in self.sessions:
            session.end(error)
        for waiting in list(self._waiting_owners.values()):
            waiting.leave()

    # -- opening -----------------------------------------------------------------------------------------------------

    def _open(self, line: Line, message: Open) -> None:
        try:
            text = decode_open_text(message.text)
            verify(text.owner, message.text, message.signature, context=OPEN_CONTEXT)
        except FarflungError as error:
            try_send(line, fault_of(error, self._node_id))
            return
        try:
            opening = self._checked(line, text, message)
            self._backend.open(
                SessionSpec(session=text.session, lease_tokens=text.lease_tokens, sampling=text.sampling, codec=text.codec)
            )
        except FarflungError as error:
            self._refuse(line, text, fault_of(error, self._node_id))
            return
        session = StageSession(self, opening, line)
        session.active_s = asyncio.get_running_loop().time()
        self._sessions[session.id] = session
        self.empty.clear()
        self._watch(session, self._config.owner_wait_s)
        waiting = self._waiting_owners.get((session.id, text.owner))
        if waiting is not None:
            waiting.leave()
            session.attach(waiting.line)
        if opening.successor is not None and not session.over:
            self._connect(session)

    def _refuse(self, line: Line, text: OpenText, fault: Fault) -> None:
        """Tells whoever brought the opening, and the owner, whose own line may be here or still come."""
        try_send(line, fault)
        if line.peer == text.owner or text.session in self._sessions:
            return
        waiting = self._waiting_owners.get((text.session, text.owner))
        if waiting is not None:
            try_send(waiting.line, fault)
            waiting.leave()
        if any(hop.node_id == line.peer for hop in text.route.hops):
            self._bury(text.session, fault)

    def _checked(self, line: Line, text: OpenText, message: Open) -> Opening:
        index = check_open(
            text,
            me=self._node_id,
            spec=self._backend.spec,
            layers=self._backend.layers,
            codecs=self._config.codecs,
            now_unix_s=self._clock(),
        )
        expected = text.owner if index == 0 else text.route.hops[index - 1].node_id
        if line.peer != expected:
            raise ProtocolViolation(f"node {short(line.peer)} brings an opening that only node {short(expected)} may bring")
        if text.session in self._sessions or text.session in self._tombstones:
            raise ProtocolViolation(f"session {short(text.session)} was opened before")
        if self.draining:
            raise SessionRefused(f"node {short(self._node_id)} is about to stop", hint="choose another route")
        if len(self._sessions) >= self._config.max_sessions:
            raise SessionRefused(f"node {short(self._node_id)} has {len(self._sessions)} sessions open, its limit")
        of_owner = sum(session.opening.text.owner == text.owner for session in self._sessions.values())
        if of_owner >= self._config.max_sessions_per_owner:
            raise SessionRefused(
                f"driver {short(text.owner)} has {of_owner} sessions open at node {short(self._node_id)}, the limit for one",
                hint="close some first",
            )
        return Opening(text, message, index)

    # -- the owner's own line ----------------------------------------------------------------------------------------

    def _attach(self, line: Line, message: Attach) -> None:
        session = self._sessions.get(message.session)
        if session is not None:
            if line.peer == session.opening.text.owner and session.owner is None:
                session.attach(line)
            else:
                fault = ProtocolViolation(f"session {short(message.session)} is not to be attached to by {short(line.peer)}")
                try_send(line, fault_of(fault, self._node_id))
            return
        if message.session in self._tombstones:
            fault_known = self._tombstones[message.session]
            try_send(line, fault_known or Close("the session is over"))
            return
        of_peer = sum(waiting.line.peer == line.peer for waiting in self._waiting_owners.values())
        if (message.session, line.peer) in self._waiting_owners:
            refused = SessionRefused(
                f"driver {short(line.peer)} has a line waiting for session {short(message.session)} already"
            )
            try_send(line, fault_of(refused, self._node_id))
        elif of_peer >= self._config.max_waiting_owners_per_peer:
            refused = SessionRefused(f"driver {short(line.peer)} has {of_peer} lines waiting for their session, the limit")
            try_send(line, fault_of(refused, self._node_id))
        else:
            waiting = WaitingOwner(self, message.session, line, self._config.owner_wait_s)
            self._waiting_owners[message.session, line.peer] = waiting

    # -- deadlines ---------------------------------------------------------------------------------------------------

    def _watch(self, session: StageSession, after_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers[session.id] = loop.call_later(after_s, self._check, session)

    def _check(self, session: StageSession) -> None:
        """Ends a session without an owner or without work (rule 7: a lease ends with its owner's silence)."""
        config = self._config
        idle_s = asyncio.get_running_loop().time() - session.active_s
        if session.owner is None:
            session.end(StageLost(f"the owner of session {short(session.id)} did not come within {config.owner_wait_s:.0f} s"))
        elif idle_s >= config.idle_timeout_s and not session.state.queue:
            session.end(
                DeadlineExceeded(
                    f"session {short(session.id)} got no window for {idle_s:.0f} s",
                    hint="open a new one when there is more to do",
                )
            )
        else:
            self._watch(session, max(1.0, config.idle_timeout_s - idle_s))

    def leave(self, session: SessionId, owner: NodeId) -> None:
        """The owner's line does not wait any more."""
        self._waiting_owners.pop((session, owner), None)

    def _bury(self, session: SessionId, fault: Fault | None) -> None:
        self._tombstones.setdefault(session, fault)
        while len(self._tombstones) > self._config.tombstones:
            self._tombstones.popitem(last=False)


class WaitingOwner:
    """An owner's line whose session has not been opened yet: the opening comes through the other stages."""

    def __init__(self, table: SessionTable, session: SessionId, line: Line, wait_s: float) -> None:
        self.line = line
        self._table = table
        self._session = session
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._overdue)
        line.bind(self)

    def leave(self) -> None:
        self._timer.cancel()
        self.line.release()
        self._table.leave(self._session, self.line.peer)

    def on_frame(self, line: Line, frame: Frame) -> None:
        """Only a close can come before the session is open."""
        self.leave()

    def on_lost(self, line: Line, error: FarflungError) -> None:
        self.leave()

    def _overdue(self) -> None:
        try_send(self.line, Close("the session was not opened in time"))
        self.leave()

"""The sessions of one node: who may open one, who has one, and how the last ones ended.

An opening for a session that is open already takes one of its edges up again (``StageSession``).
An opening that cannot be served is answered by a fault to whoever brought it, and remembered as a tombstone, so that the
owner's own line - which may arrive later - learns the reason too, and late windows are swallowed.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import NamedTuple

from farflung.core.errors import DeadlineExceeded, FarflungError, ProtocolViolation, SessionRefused, StageLost
from farflung.core.ids import NodeId, SessionId, short
from farflung.core.messages import Attach, Close, Fault, Open, OpenText
from farflung.core.route import FIRST_EPOCH
from farflung.engine.backend import SessionSpec, StageBackend
from farflung.identity.keys import verify
from farflung.node.admission import Admission
from farflung.node.log_budget import LogBudget
from farflung.node.opening import Opening
from farflung.node.quotas import Asked, Quotas, Usage, check_session, check_waiting
from farflung.node.row_log import OnEvicted, RowLog
from farflung.node.stage_session import StageSession, fault_of
from farflung.protocol.limits import MAX_ALIVE_SLOTS
from farflung.protocol.opening import OPEN_CONTEXT, check_expiry, check_newer, check_open, decode_open_text
from farflung.swarm.reconnect import ReconnectConfig
from farflung.transport.lines import Line, LinkPool, try_send
from farflung.transport.link import Frame
from farflung.wire.codec import CODEC_NAMES


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Quotas and times.

    Attributes:
        codecs: what this node speaks between stages.
        quotas: what one owner, and all, may take.
        owner_wait_s: how long an owner's line waits for its session, and a session for its owner's line.
        max_lease_s: the longest that a session goes on without a sign of its owner.
        max_slots: slots of one session that are not committed.
        reconnect: to the next stage.
        tombstones: ended sessions remembered.
    """

    codecs: frozenset[str] = frozenset(CODEC_NAMES)
    quotas: Quotas = field(default_factory=Quotas)
    owner_wait_s: float = 10.0
    max_lease_s: float = 120.0
    max_slots: int = MAX_ALIVE_SLOTS
    reconnect: ReconnectConfig = field(default_factory=ReconnectConfig)
    tombstones: int = 4096


class Tombstone(NamedTuple):
    """How a session ended here, in which epoch of this stage; only a later one may open it again."""

    epoch: int
    fault: Fault | None


class SessionTable:
    """Keeps ``StageSession``s by id and implements ``SessionHost`` for them.

    Args:
        config: see above.
        node_id: this node.
        backend: holds the KV.
        pool: the node's links.
        logs: what the stages' logs share.
        admission: whose sessions are taken; may be replaced at any time.
        clock: wall clock, seconds since 1970.
        random: for waits between tries.
        connect: runs ``StageSession.connect`` in a task that the node owns.
    """

    def __init__(
        self,
        config: TableConfig,
        node_id: NodeId,
        backend: StageBackend,
        pool: LinkPool,
        *,
        logs: LogBudget,
        admission: Admission,
        clock: Callable[[], float],
        random: Random,
        connect: Callable[[StageSession], None],
    ) -> None:
        self._config = config
        self._node_id = node_id
        self._backend = backend
        self._logs = logs
        self._clock = clock
        self.admission = admission
        self.connect = connect
        self.random = random
        self.pool = pool
        self._sessions: dict[SessionId, StageSession] = {}
        self._timers: dict[SessionId, asyncio.TimerHandle] = {}
        self._waiting_owners: dict[tuple[SessionId, NodeId], WaitingOwner] = {}
        self._tombstones: OrderedDict[SessionId, Tombstone] = OrderedDict()
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

    @property
    def max_slots(self) -> int:
        return self._config.max_slots

    @property
    def reconnect(self) -> ReconnectConfig:
        return self._config.reconnect

    def open_log(self, session: SessionId, on_evicted: OnEvicted) -> RowLog:
        return self._logs.open(session, on_evicted)

    def ready(self, session: StageSession) -> None:
        self._ready.setdefault(session.id, session)
        self.wake.set()

    def ended(self, session: StageSession, fault: Fault | None) -> None:
        del self._sessions[session.id]
        self._ready.pop(session.id, None)
        self._timers.pop(session.id).cancel()
        self._backend.close(session.id)
        self._bury(session.id, session.opening.hop.epoch, fault)
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
        session = self._sessions.get(text.session)
        try:
            opening = self._checked(text, message)
            if line.peer != opening.predecessor_id:
                raise ProtocolViolation(
                    f"node {short(line.peer)} brings an opening that only node {short(opening.predecessor_id)} may bring"
                )
            if session is not None and self._stays(session, opening):
                self._take_up(session, line, opening)
            else:
                self._begin(line, opening)
        except FarflungError as error:
            self._refuse(line, text, fault_of(error, self._node_id))

    def reopen(self, session: StageSession, line: Line, message: Open) -> None:
        """The owner's newer opening for an open session, over its own line. Raises where it is not good."""
        text = decode_open_text(message.text)
        verify(text.owner, message.text, message.signature, context=OPEN_CONTEXT)
        if text.session != session.id:
            raise ProtocolViolation(
                f"an opening of session {short(text.session)} came on a line of session {short(session.id)}"
            )
        newer = self._checked(text, replace(message, codec=session.opening.message.codec))
        if self._stays(session, newer):
            session.adopt(newer)
        else:
            session.end(None)  # it begins anew when the new predecessor brings this opening

    def _checked(self, text: OpenText, message: Open) -> Opening:
        config = self._config
        index = check_open(
            text,
            message.codec,
            me=self._node_id,
            spec=self._backend.spec,
            layers=self._backend.layers,
            codecs=config.codecs,
        )
        self.admission.check_open(text)
        return Opening(text, message, index)

    def _stays(self, session: StageSession, opening: Opening) -> bool:
        """Whether an open session goes on with that opening: it is for the same hop. One with a higher epoch begins anew here.

        Raises ProtocolViolation for an older epoch, or an opening that is about more than the route."""
        check_newer(opening.text, session.opening.text)
        if opening.epoch_in < session.opening.epoch_in:
            raise ProtocolViolation(
                f"an opening of epoch {opening.epoch_in} came for an edge of epoch {session.opening.epoch_in}"
            )
        return opening.hop.epoch == session.opening.hop.epoch

    def _take_up(self, session: StageSession, line: Line, opening: Opening) -> None:
        known = session.opening
        if opening.message.codec != known.message.codec:
            raise ProtocolViolation(f"session {short(session.id)} takes rows in {known.message.codec}, not in another codec")
        newest = opening if opening.text.route.epoch > known.text.route.epoch else known
        session.take_up(line, newest, asks_have=opening.message.asks_have)

    def _begin(self, line: Line, opening: Opening) -> None:
        text, config = opening.text, self._config
        check_expiry(text, self._clock())
        if (old := self._sessions.get(text.session)) is not None:
            old.end(None)  # a higher epoch: the owner wants it to begin anew
        buried = self._tombstones.get(text.session)
        if buried is not None and buried.epoch >= opening.hop.epoch:
            raise ProtocolViolation(f"session {short(text.session)} was opened before")
        if self.draining:
            raise SessionRefused(f"node {short(self._node_id)} is about to stop", hint="choose another route")
        check_session(
            config.quotas,
            Asked(text.session, text.owner, text.lease_tokens),
            of_owner=self._usage(text.owner),
            of_all=self._usage(None),
            kv_tokens=self._backend.kv_tokens,
        )
        codec_out = self._codec_out(opening)
        self._backend.open(
            SessionSpec(
                session=text.session,
                lease_tokens=text.lease_tokens,
                sampling=text.sampling,
                codec=opening.message.codec or codec_out,
                codec_out=codec_out,
                prompt_tokens=text.prompt_tokens,
                context_tokens=text.prompt_tokens + text.max_tokens,
            )
        )
        session = StageSession(self, opening, codec_out)
        self._sessions[session.id] = session
        self._tombstones.pop(session.id, None)
        self.empty.clear()
        self._watch(session, self._config.owner_wait_s)
        session.take_up(line, opening, asks_have=opening.message.asks_have)
        waiting = self._waiting_owners.get((session.id, text.owner))
        if waiting is not None and not session.over:
            waiting.leave()
            session.attach(waiting.line)
        if opening.successor is not None and not session.over:
            self.connect(session)

    def _codec_out(self, opening: Opening) -> str:
        """How this stage codes what it sends, for the whole session. Where the next stage's link is not up yet, what every
        stage speaks comes first."""
        allowed = [name for name in opening.text.codecs if name in self._config.codecs]
        if opening.successor is None:
            return allowed[0]
        return allowed[0]

    def _usage(self, owner: NodeId | None) -> Usage:
        """Of one owner, or of all."""
        of = [session for session in self._sessions.values() if owner in (None, session.opening.text.owner)]
        return Usage(len(of), sum(session.opening.text.lease_tokens for session in of))

    def _refuse(self, line: Line, text: OpenText, fault: Fault) -> None:
        """Tells whoever brought the opening, and the owner, whose own line may be here or still come."""
        try_send(line, fault)
        if line.peer == text.owner or text.session in self._sessions:
            return
        waiting = self._waiting_owners.get((text.session, text.owner))
        if waiting is not None:
            try_send(waiting.line, fault)
            waiting.leave()
        if text.route.hop_of(line.peer) is not None:
            hop = text.route.hop_of(self._node_id)
            self._bury(text.session, FIRST_EPOCH if hop is None else hop.epoch, fault)

    # -- the owner's own line ----------------------------------------------------------------------------------------

    def _attach(self, line: Line, message: Attach) -> None:
        session = self._sessions.get(message.session)
        if session is not None:
            if line.peer == session.opening.text.owner and session.opening.index > 0:
                session.attach(line)
            else:
                fault = ProtocolViolation(f"session {short(message.session)} is not to be attached to by {short(line.peer)}")
                try_send(line, fault_of(fault, self._node_id))
            return
        if message.session in self._tombstones:
            try_send(line, self._tombstones[message.session].fault or Close("the session is over"))
            return
        if (earlier := self._waiting_owners.get((message.session, line.peer))) is not None:
            earlier.leave()
        of_peer = sum(waiting.line.peer == line.peer for waiting in self._waiting_owners.values())
        try:
            self.admission.check_owner_line(line.peer)
            check_waiting(self._config.quotas, line.peer, of_peer=of_peer, of_all=len(self._waiting_owners))
        except FarflungError as error:
            try_send(line, fault_of(error, self._node_id))
            return
        waiting = WaitingOwner(self, message.session, line, self._config.owner_wait_s)
        self._waiting_owners[message.session, line.peer] = waiting

    # -- deadlines ---------------------------------------------------------------------------------------------------

    def _watch(self, session: StageSession, after_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers[session.id] = loop.call_later(after_s, self._check, session)

    def _check(self, session: StageSession) -> None:
        """Ends a session whose owner is gone, or silent (rule 7: a lease ends with its owner's silence)."""
        config, now_s = self._config, asyncio.get_running_loop().time()
        lease_s = min(config.max_lease_s, session.opening.text.lease_s)
        gone_s = 0.0 if session.owner_gone_s is None else now_s - session.owner_gone_s
        silent_s = now_s - session.seen_s
        if gone_s >= config.owner_wait_s:
            session.end(StageLost(f"the owner of session {short(session.id)} did not come within {config.owner_wait_s:.0f} s"))
        elif silent_s >= lease_s:
            session.end(
                DeadlineExceeded(
                    f"session {short(session.id)} had no sign of its owner for {silent_s:.0f} s, its lease",
                    hint="renew it while it waits, or open a new one when there is more to do",
                )
            )
        else:
            self._watch(session, max(0.05, min(lease_s - silent_s, config.owner_wait_s - gone_s)))

    def leave(self, session: SessionId, owner: NodeId) -> None:
        """The owner's line does not wait any more."""
        self._waiting_owners.pop((session, owner), None)

    def _bury(self, session: SessionId, epoch: int, fault: Fault | None) -> None:
        buried = self._tombstones.get(session)
        if buried is None or buried.epoch < epoch:
            self._tombstones[session] = Tombstone(epoch, fault)
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

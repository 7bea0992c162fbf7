"""The sessions of one node: who may open one, who has one, and how the last ones ended.

An opening for a session that is open already takes one of its edges up again (``StageSession``).
An opening that cannot be served is answered by a fault to whoever brought it, and remembered as a tombstone, so that the
owner's own line - which may arrive later - learns the reason too, and late windows are swallowed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from msgspec.structs import replace

from farflung.core.errors import DeadlineExceeded, FarflungError, ProtocolViolation, SessionRefused, StageLost
from farflung.core.ids import NodeId, SessionId, short
from farflung.core.messages import Attach, Close, Fault, Open, OpenText
from farflung.engine.backend import SessionSpec, StageBackend
from farflung.node.admission import Admission
from farflung.node.doorkeeper import Doorkeeper
from farflung.node.faults import fault_of
from farflung.node.log_budget import LogBudget
from farflung.node.opening import Opening, key_of
from farflung.node.quotas import Asked, Quotas, Usage, check_session
from farflung.node.row_log import OnEvicted, RowLog
from farflung.node.stage_session import StageSession
from farflung.node.tombstones import Tombstones
from farflung.node.waiting_owners import WaitingOwners
from farflung.protocol.limits import MAX_ALIVE_SLOTS
from farflung.protocol.opening import check_expiry
from farflung.swarm.reconnect import ReconnectConfig
from farflung.transport.lines import Line, LinkPool, try_send
from farflung.transport.link import Frame
from farflung.wire.codec import CODEC_NAMES, MANDATORY_CODECS, choose_codec


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Quotas and times.

    Attributes:
        codecs: what this node speaks between stages.
        quotas: what one owner, and all, may take.
        owner_wait_s: how long an owner's line waits for its session, and a session for its owner's line.
        max_slots: slots of one session that are not committed.
        reconnect: to the next stage.
        tombstones: ended sessions remembered.
    """

    codecs: frozenset[str] = frozenset(CODEC_NAMES)
    quotas: Quotas = field(default_factory=Quotas)
    owner_wait_s: float = 10.0
    max_slots: int = MAX_ALIVE_SLOTS
    reconnect: ReconnectConfig = field(default_factory=ReconnectConfig)
    tombstones: int = 4096


class SessionTable:
    """Keeps ``StageSession``s by id and implements ``SessionHost`` for them.

    Args:
        config: see above.
        node_id: this node.
        backend: holds the KV.
        pool: the node's links.
        logs: what the stages' logs share.
        admission: whose sessions are taken.
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
        self.node_id = node_id
        self._config = config
        self._backend = backend
        self._logs = logs
        self._clock = clock
        self._doorkeeper = Doorkeeper(node_id, backend, config.codecs, admission)
        self.connect = connect
        self.random = random
        self.pool = pool
        self._sessions: dict[SessionId, StageSession] = {}
        self._timers: dict[SessionId, asyncio.TimerHandle] = {}
        self._waiting_owners = WaitingOwners(config.quotas, config.owner_wait_s)
        self._tombstones = Tombstones(config.tombstones)
        self._ready: dict[SessionId, StageSession] = {}
        self.draining = False
        self.wake = asyncio.Event()
        self.empty = asyncio.Event()
        self.empty.set()

    # -- SessionHost -------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        return self._backend.spec.vocab_size

    @property
    def hidden_size(self) -> int:
        return self._backend.spec.hidden_size

    @property
    def context_tokens(self) -> int:
        return self._backend.spec.context_tokens

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
        self._tombstones.bury(session.id, session.opening.hop.epoch, fault)
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
        return sum(session.state.queue_rows for session in self._sessions.values())

    @property
    def waiting_owners(self) -> int:
        return len(self._waiting_owners)

    def admit(self, admission: Admission) -> None:
        """Judges openings by it from now on; sessions that are open go on."""
        self._doorkeeper.admission = admission

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
        self._waiting_owners.close()

    # -- opening -----------------------------------------------------------------------------------------------------

    def _open(self, line: Line, message: Open) -> None:
        try:
            text = self._doorkeeper.read(message)
        except FarflungError as error:
            try_send(line, fault_of(error, self.node_id))
            return
        session = self._sessions.get(key_of(text.session, text.owner))
        try:
            opening = self._doorkeeper.check(text, message)
            self._doorkeeper.check_bringer(opening, line.peer)
            if session is not None and self._doorkeeper.goes_on(session.opening, opening):
                known = session.opening
                newest = opening if opening.text.route.epoch > known.text.route.epoch else known
                session.take_up(line, newest, asks_have=message.asks_have)
            else:
                self._begin(line, opening)
        except FarflungError as error:
            self._refuse(line, text, fault_of(error, self.node_id))

    def reopen(self, session: StageSession, message: Open) -> None:
        """The owner's newer opening for an open session, over its own line. Raises where it is not good."""
        text = self._doorkeeper.read(message)
        if text.session != session.opening.text.session:
            raise ProtocolViolation(f"an opening of session {short(text.session)} came on a line of {short(session.id)}")
        known = session.opening
        if text.route.epoch <= known.text.route.epoch:
            return  # it came by way of the other stages before
        newer = self._doorkeeper.check(text, replace(message, codec=known.message.codec))
        if self._doorkeeper.goes_on(known, newer):
            session.adopt(newer)
        # Else it begins anew: when the new predecessor brings this opening.

    def _begin(self, line: Line, opening: Opening) -> None:
        text, config = opening.text, self._config
        key = key_of(text.session, text.owner)
        check_expiry(text, self._clock())
        if self.draining:
            raise SessionRefused(f"node {short(self.node_id)} is about to stop", hint="choose another route")
        owner: Line | None = None
        if (old := self._sessions.get(key)) is not None:  # a higher epoch: the owner wants it to begin anew
            owner = old.release_owner()
            old.end(None)
        buried = self._tombstones.find(key)
        try:
            if buried is not None and buried.epoch >= opening.hop.epoch:
                raise ProtocolViolation(f"session {short(text.session)} was opened before")
            codec_out = self._codec_out(opening)
            self._lease(key, opening, codec_out)
        except FarflungError as error:
            try_send(owner, fault_of(error, self.node_id))
            if owner is not None:
                owner.release()
            raise
        session = self._sessions[key] = StageSession(self, opening, codec_out)
        self._tombstones.raise_from(key)
        self.empty.clear()
        self._watch(session, config.owner_wait_s)
        session.take_up(line, opening, asks_have=opening.message.asks_have)
        owner = self._waiting_owners.take(text.session, text.owner) or owner
        if owner is not None and not session.over:
            session.attach(owner)
        if opening.successor is not None and not session.over:
            self.connect(session)

    def _lease(self, key: SessionId, opening: Opening, codec_out: str) -> None:
        """KV for the session. Raises SessionRefused where a quota or the pool says no."""
        text = opening.text
        check_session(
            self._config.quotas,
            Asked(text.session, text.owner, text.lease_tokens),
            of_owner=self._usage(text.owner),
            of_all=self._usage(None),
            kv_tokens=self._backend.kv_tokens,
        )
        self._backend.open(
            SessionSpec(
                session=key,
                lease_tokens=text.lease_tokens,
                sampling=text.sampling,
                codec=opening.message.codec or codec_out,
                codec_out=codec_out,
                prompt_tokens=text.prompt_tokens,
                context_tokens=text.prompt_tokens + text.max_tokens,
            )
        )

    def _codec_out(self, opening: Opening) -> str:
        """How this stage codes what it sends, for the whole session. Where the link to the next stage is not up yet, it is what
        every stage speaks."""
        allowed = [name for name in opening.text.codecs if name in self._config.codecs]
        hop = opening.successor
        if hop is None:
            return allowed[0]
        link = next((link for link in self.pool.links if link.peer == hop.node_id), None)
        hello = None if link is None else link.peer_hello
        mandatory = [name for name in allowed if name in MANDATORY_CODECS]
        return choose_codec(
            allowed,
            (mandatory or allowed) if hello is None else hello.codecs,
            width=self.hidden_size,
            rate_bytes_per_s=None if link is None else link.stats.delivery_bytes_per_s,
        )

    def _usage(self, owner: NodeId | None) -> Usage:
        """Of one owner, or of all."""
        of = [session for session in self._sessions.values() if owner in (None, session.opening.text.owner)]
        return Usage(len(of), sum(session.opening.text.lease_tokens for session in of))

    def _refuse(self, line: Line, text: OpenText, fault: Fault) -> None:
        """Tells whoever brought the opening; and where that was the one to bring it, the owner, whose own line may be here or
        still come."""
        try_send(line, fault)
        key, index = key_of(text.session, text.owner), text.route.index_of(self.node_id)
        before = None if index is None else text.route.predecessor(index)
        if index is None or before is None or before.node_id != line.peer or key in self._sessions:
            return
        self._waiting_owners.refuse(text.session, text.owner, fault)
        self._tombstones.bury(key, text.route.hops[index].epoch, fault)

    def _attach(self, line: Line, message: Attach) -> None:
        """The owner's own line, to a session that is open, or over, or still to come."""
        key = key_of(message.session, line.peer)
        session, buried = self._sessions.get(key), self._tombstones.find(key)
        try:
            if session is not None:
                if session.opening.index == 0:
                    raise ProtocolViolation(f"session {short(message.session)} is fed by its owner here, not attached to")
                session.attach(line)
            elif buried is not None:
                try_send(line, buried.fault or Close("the session is over"))
            else:
                self._doorkeeper.admission.check_owner_line(line.peer)
                self._waiting_owners.add(message.session, line)
        except FarflungError as error:
            try_send(line, fault_of(error, self.node_id))

    # -- deadlines ---------------------------------------------------------------------------------------------------

    def _watch(self, session: StageSession, after_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers[session.id] = loop.call_later(after_s, self._check, session)

    def _check(self, session: StageSession) -> None:
        """Ends a session whose owner is gone, or silent (rule 7: a lease ends with its owner's silence)."""
        config, now_s = self._config, asyncio.get_running_loop().time()
        lease_s = session.opening.text.lease_s
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

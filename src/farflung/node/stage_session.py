"""One session at this node: performs what the stage's state machine decides, over up to three lines.

predecessor --windows--> [ this stage ] --windows--> successor
                                └--answers, faults, report--> owner      (at the first stage the predecessor is the owner)

A line that breaks does not end the session. The predecessor and the owner come again, each over a new line; to the successor
this stage dials again. What ends it is the owner, a broken rule, a failed step, or the end of the lease.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import numpy as np
from msgspec.structs import replace

from farflung.core.errors import FarflungError, ProtocolViolation, StageLost
from farflung.core.ids import NodeId, SessionId, short
from farflung.core.messages import (
    Close,
    Credit,
    Evicted,
    Fault,
    Grant,
    Have,
    Message,
    Open,
    Renew,
    StageTime,
    Trouble,
    Window,
)
from farflung.engine.backend import StageResult, StageWork
from farflung.node.meter import Meter
from farflung.node.opening import Opening
from farflung.node.row_log import OnEvicted, RowLog
from farflung.protocol.events import (
    CreditReceived,
    Forward,
    HaveReceived,
    OwnerAttached,
    OwnerLost,
    PredecessorUp,
    Reply,
    ReturnCredit,
    Settled,
    StageEvent,
    StepDone,
    StepStarted,
    SuccessorLost,
    SuccessorReplaced,
    SuccessorUp,
    TellHave,
    WindowReceived,
)
from farflung.protocol.outgoing import OutEdge
from farflung.protocol.stage import advance
from farflung.protocol.stage_state import ID_BYTES, StageState
from farflung.protocol.windows import slots_of
from farflung.swarm.reconnect import ReconnectConfig, dial_again
from farflung.transport.lines import Line, LinkPool, try_send
from farflung.transport.link import Buffer, Frame, Priority
from farflung.wire.codec import codec


class SessionHost(Protocol):
    """What a session needs of its node."""

    @property
    def node_id(self) -> NodeId: ...

    @property
    def pool(self) -> LinkPool: ...

    @property
    def random(self) -> Random: ...

    @property
    def reconnect(self) -> ReconnectConfig: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def max_slots(self) -> int: ...

    def open_log(self, session: SessionId, on_evicted: OnEvicted) -> RowLog: ...

    def ready(self, session: StageSession) -> None:
        """It has a window to compute."""

    def connect(self, session: StageSession) -> None:
        """Run ``session.connect`` in a task."""

    def reopen(self, session: StageSession, line: Line, message: Open) -> None:
        """The owner sent another opening for it."""

    def ended(self, session: StageSession, fault: Fault | None) -> None:
        """It is over: free its KV, remember its end."""


@dataclass(eq=False)
class StageSession:
    """See the module. ``end`` is the only way out, and it may be called at any time, more than once.

    Attributes:
        host: the node.
        opening: the newest one.
        codec_out: how this stage codes its rows, from the first to the last: the log keeps them as they were sent.
        predecessor, owner, successor: lines; None while broken.
        seen_s: last sign of the owner, on the loop's clock; ``owner_gone_s``: since when its line is broken.
    """

    host: SessionHost
    opening: Opening
    codec_out: str
    predecessor: Line | None = None
    owner: Line | None = None
    successor: Line | None = None
    over: bool = False
    seen_s: float = 0.0
    owner_gone_s: float | None = None
    meter: Meter = field(init=False)
    state: StageState = field(init=False)
    log: RowLog | None = field(init=False, default=None)
    _connecting: bool = False
    _begun_epoch: int = 0  # of the edge on which the successor was opened already
    _trouble: Trouble | None = None
    _step_queue_ms: float = 0.0

    def __post_init__(self) -> None:
        text, is_first, width = self.opening.text, self.opening.index == 0, self.host.hidden_size
        has_ids = text.sampling.needs_history
        epoch_out = self.opening.epoch_out
        out = None
        if epoch_out is not None:
            out = OutEdge(epoch=epoch_out, row_bytes=codec(self.codec_out).row_bytes(width) + ID_BYTES * has_ids)
            self.log = self.host.open_log(text.session, self._on_evicted)
        self.meter = Meter(self.host.node_id)
        self.seen_s = self.owner_gone_s = asyncio.get_running_loop().time()
        self.state = StageState(
            session=text.session,
            epoch=self.opening.epoch_in,
            row_bytes=ID_BYTES if is_first else codec(self.opening.message.codec).row_bytes(width),
            has_ids=has_ids and not is_first,
            lease_tokens=text.lease_tokens,
            max_slots=self.host.max_slots,
            out=out,
        )

    @property
    def id(self) -> SessionId:
        return self.opening.text.session

    # -- lines -------------------------------------------------------------------------------------------------------

    def take_up(self, line: Line, opening: Opening, *, asks_have: bool) -> None:
        """The predecessor brings the opening, on a new line: the first, one after a broken one, or a new predecessor's first.
        At the first stage it is the owner's line, too. ``opening`` is the newest known."""
        self.adopt(opening)
        self._let_go(self.predecessor)
        self.predecessor = line
        line.bind(self)
        self._feed_or_end(PredecessorUp(opening.epoch_in, asks_have))
        if opening.index == 0 and not self.over:
            self.attach(line)

    def adopt(self, opening: Opening) -> None:
        """A newer route: edges that it renews are left, and the one to the successor is taken up again."""
        was, self.opening = self.opening, opening
        if opening.epoch_in > was.epoch_in:
            self._let_go(self.predecessor)
            self.predecessor = None
        if opening.epoch_out != was.epoch_out and opening.epoch_out is not None:
            self._let_go(self.successor)
            self.successor = None
            self._trouble = None
            self._feed_or_end(SuccessorReplaced(opening.epoch_out))
            self.host.connect(self)

    def attach(self, owner: Line) -> None:
        """The owner's own line is up: answers that it may have missed go out."""
        self._let_go(self.owner if self.owner is not owner else None)
        self.owner = owner
        self.owner_gone_s = None
        self.seen_s = asyncio.get_running_loop().time()
        owner.bind(self)
        try_send(owner, Grant(self.state.max_slots))
        if self.log is not None and self.log.complete_from:
            try_send(owner, Evicted(self.log.complete_from))
        if self._trouble is not None:
            try_send(owner, self._trouble)
        self._feed_or_end(OwnerAttached())

    async def connect(self) -> None:
        """Takes the edge to the successor up, and what was computed meanwhile goes out. Where that fails, the owner is told: it
        may give the session another route. One that has never been open there is not worth the wait, and ends."""
        if self._connecting:
            return  # that one asks again whom to dial
        self._connecting = True
        try:
            while (peer := self._missing_successor()) is not None:
                await self._connect_to(peer, first=self._begun_epoch == 0)
                if self._trouble is not None:
                    return
        finally:
            self._connecting = False

    async def _connect_to(self, peer: NodeId, *, first: bool) -> None:
        host = self.host
        try:
            line = await dial_again(host.pool, self, self._missing_successor, host.reconnect, host.random, patient=not first)
            if line is not None:
                self._open_successor(line)
        except FarflungError as error:  # out of reach; or the link is gone again, or will not take the rows
            if self._missing_successor() != peer:
                return  # the owner has named another meanwhile
            lost = self._lost("cannot reach", peer, error)
            if first:
                self.end(lost, at_fault=peer)
            else:
                self._tell_trouble(peer, lost)

    def _missing_successor(self) -> NodeId | None:
        hop = self.opening.successor
        return None if self.over or self.successor is not None or hop is None else hop.node_id

    def _open_successor(self, line: Line) -> None:
        hop, epoch = self.opening.successor, self.opening.epoch_out
        if hop is None or epoch is None:
            return
        # A node that enters the route with this edge holds nothing yet: it need not be asked.
        begins = self._begun_epoch < epoch == hop.epoch
        self.successor, self._trouble, self._begun_epoch = line, None, epoch
        message = replace(self.opening.message, codec=self.codec_out, asks_have=not begins)
        line.send(message, (), Priority.PREFILL)
        self._feed(SuccessorUp(begins))

    def on_frame(self, line: Line, frame: Frame) -> None:
        message = frame.message
        try:
            if line is self.predecessor and isinstance(message, Window):
                self._receive(message, frame)
            elif line is self.owner:
                self._from_owner(line, message)
            elif line is self.successor:
                self._from_successor(line, message)
            elif line is self.predecessor and isinstance(message, Close):
                # An attached owner decides itself; an owner that never came leaves it to the chain.
                self.predecessor = None
                line.release()
                if self.owner is None:
                    self.end(None)
            else:
                raise _no_place(message, line)
        except FarflungError as error:
            self.end(error)

    def _from_owner(self, line: Line, message: Message) -> None:
        self.seen_s = asyncio.get_running_loop().time()
        match message:
            case Close():
                self.end(None)
            case Renew():
                return
            case Open():
                self.host.reopen(self, line, message)
            case _:
                raise _no_place(message, line)

    def _from_successor(self, line: Line, message: Message) -> None:
        match message:
            case Credit():
                self._feed(CreditReceived(message.bytes))
            case Have():
                self._feed(HaveReceived(message))
            case Fault():
                hop = self.opening.text.route.hop_of(message.node_id)
                self._successor_ended(line, replace(message, node_id=line.peer if hop is None else hop.node_id))
            case Close():
                ended = StageLost(f"node {short(line.peer)} closed session {short(self.id)}")
                self._successor_ended(line, fault_of(ended, line.peer))
            case _:
                raise _no_place(message, line)

    def _successor_ended(self, line: Line, fault: Fault) -> None:
        """The session is over there. The owner decides what becomes of it; without its line it is over here, too."""
        if self.owner is None:
            self._end(fault)
            return
        line.release()
        self.successor = None
        self._feed(SuccessorLost())
        self._trouble = Trouble(fault.node_id, fault.code, fault.message, fault.hint)
        try_send(self.owner, self._trouble)

    def on_lost(self, line: Line, error: FarflungError) -> None:
        if self.over:
            return
        if line is self.predecessor:
            self.predecessor = None
        if line is self.owner:
            self.owner = None
            self.owner_gone_s = asyncio.get_running_loop().time()
            self._feed_or_end(OwnerLost())
        if line is self.successor:
            self.successor = None
            self._feed_or_end(SuccessorLost())
            self.host.connect(self)

    def _tell_trouble(self, node_id: NodeId, error: FarflungError) -> None:
        fault = fault_of(error, node_id)
        self._trouble = Trouble(fault.node_id, fault.code, fault.message, fault.hint)
        try_send(self.owner, self._trouble)

    def _on_evicted(self, session: SessionId, complete_from: int) -> None:
        del session
        try_send(self.owner, Evicted(complete_from))

    # -- computing ---------------------------------------------------------------------------------------------------

    def start_step(self, max_rows: int) -> StageWork:
        """The work of the oldest waiting window, or of its first ``max_rows`` rows, now being computed."""
        self._feed(StepStarted(max_rows))
        pending = self.state.queue[0]
        window, payload = pending.window, pending.payload
        self._step_queue_ms = 1e3 * (asyncio.get_running_loop().time() - pending.at_s)
        ids = payload if self.opening.index == 0 else pending.ids
        return StageWork(
            session=self.id,
            runs=window.runs,
            commit=window.commit,
            token_ids=np.frombuffer(ids, dtype="<i4") if self.opening.index == 0 or self.state.has_ids else None,
            rows=None if self.opening.index == 0 else payload,
            want=tuple(slot for span in window.want for slot in span),
        )

    def finish_step(self, result: StageResult, step_ms: float, step_rows: int, queue_rows: int) -> None:
        """Takes the result of what ``start_step`` gave; ``step_rows``: computed in that step, of all sessions;
        ``queue_rows``: waiting after it."""
        if self.over:
            return
        if result.error is not None:
            self.end(result.error)
            return
        pending = self.state.queue[0]
        slots = slots_of(pending.window)
        try:
            if self.log is not None and slots:
                is_first = self.opening.index == 0
                has_ids = self.opening.text.sampling.needs_history
                ids = bytes(pending.payload if is_first else pending.ids) if has_ids else None
                self.log.append(slots, result.rows or b"", ids)
            self.meter.computed(pending.window, slots, result.rows, step_ms)
            time = None if pending.window.timeline is None else self._stage_time(step_ms, step_rows)
            self._feed(StepDone(result.tokens, result.logprobs, queue_rows, time))
        except FarflungError as error:  # a broken rule, a link that is down or cannot take more
            self.end(error)

    def _stage_time(self, step_ms: float, step_rows: int) -> StageTime:
        round_trip_s = self.predecessor.link.stats.round_trip_s if self.predecessor is not None else None
        rate = self.successor.link.stats.delivery_bytes_per_s if self.successor is not None else None
        return StageTime((round_trip_s or 0.0) * 500, self._step_queue_ms, step_ms, step_rows, rate or 0.0)

    # -- ending ------------------------------------------------------------------------------------------------------

    def end(self, error: FarflungError | None, *, at_fault: NodeId | None = None) -> None:
        """Ends the session here. The owner hears a report or the fault; without an owner the predecessor relays it."""
        self._end(None if error is None else fault_of(error, at_fault or self.host.node_id))

    def _end(self, fault: Fault | None) -> None:
        if self.over:
            return
        self.over = True
        self.host.ended(self, fault)
        try_send(self.successor, Close("the session ended"))
        try_send(self.owner or self.predecessor, self.meter.report if fault is None else fault)
        for line in (self.predecessor, self.owner, self.successor):
            self._let_go(line)
        if self.log is not None:
            self.log.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _receive(self, window: Window, frame: Frame) -> None:
        has_ids = self.state.has_ids
        if len(frame.buffers) != 1 + has_ids:
            raise ProtocolViolation(f"a window carries {len(frame.buffers)} buffers, expected {1 + has_ids}")
        payload = memoryview(frame.buffers[0])
        ids = memoryview(frame.buffers[1]) if has_ids else memoryview(b"")
        self._check_ids(payload if self.opening.index == 0 else ids)
        self.seen_s = asyncio.get_running_loop().time()
        queued = len(self.state.queue)
        self._feed(WindowReceived(window, payload, ids, self.seen_s))
        for pending in self.state.queue[queued:]:
            self.meter.received(slots_of(pending.window), pending.payload)

    def _check_ids(self, ids: memoryview) -> None:
        if not ids or len(ids) % ID_BYTES:
            return  # a size that does not fit is told by the rules
        found = np.frombuffer(ids, dtype="<i4")
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= self.host.vocab_size:
            raise ProtocolViolation(f"token ids {low}..{high} are outside the vocabulary of {self.host.vocab_size}")

    def _feed_or_end(self, event: StageEvent) -> None:
        try:
            self._feed(event)
        except FarflungError as error:  # a broken rule, a link that is down or cannot take more
            self.end(error)

    def _feed(self, event: StageEvent) -> None:
        """Advances the machine and performs its effects. Raises what breaks a rule, or a link that cannot take more."""
        self.state, effects = advance(self.state, event)
        for effect in effects:
            match effect:
                case Forward():
                    self._forward(effect.window)
                case Reply():
                    self._send(self.owner, effect.answer, (), is_decode=True)
                case ReturnCredit():
                    try_send(self.predecessor, Credit(effect.bytes))
                case TellHave():
                    try_send(self.predecessor, effect.have)
                case Settled():
                    self._settle(effect)
        if self.state.ready is not None:
            self.host.ready(self)

    def _forward(self, window: Window) -> None:
        if self.log is None:
            return
        slots = slots_of(window)
        buffers: tuple[Buffer, ...] = (self.log.payload(slots),)
        if self.opening.text.sampling.needs_history:
            buffers += (self.log.ids(slots),)
        self._send(self.successor, window, buffers, is_decode=window.is_decode)

    def _settle(self, settled: Settled) -> None:
        self.meter.settled(settled, is_tail=self.log is None)
        if self.log is not None:
            self.log.commit(settled.slots)
            self.log.drop(settled.died)

    def _send(self, line: Line | None, message: Message, buffers: tuple[Buffer, ...], *, is_decode: bool) -> None:
        """A link that is gone is told of by ``on_lost``; what was not sent goes out over the next one."""
        if line is None or not line.link.is_up:
            return
        size = line.send(message, buffers, Priority.DECODE if is_decode else Priority.PREFILL)
        self.meter.sent(size, is_decode=is_decode)

    def _let_go(self, line: Line | None) -> None:
        if line is not None:
            line.release()

    def _lost(self, what: str, peer: NodeId, error: FarflungError) -> StageLost:
        hop = self.opening.text.route.hop_of(peer)
        layers = "" if hop is None else f" (layers {hop.layers})"
        return StageLost(
            f"node {short(self.host.node_id)} {what} node {short(peer)}{layers}: {error}",
            hint=error.hint or "another node must take its layers",
        )


def _no_place(message: Message, line: Line) -> ProtocolViolation:
    return ProtocolViolation(f"a {type(message).__name__} from node {short(line.peer)} has no place on this line")


def fault_of(error: FarflungError, node_id: NodeId) -> Fault:
    """The error as it travels."""
    return Fault(node_id, error.code, error.message[:2000], error.hint[:2000])

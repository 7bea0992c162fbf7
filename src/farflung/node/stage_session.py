"""One session at this node: performs what the stage's state machine decides, over up to three lines.

predecessor --windows--> [ this stage ] --windows--> successor
                                └--answers, faults, report--> owner      (at the first stage the predecessor is the owner)

A line that breaks does not end the session. The predecessor and the owner come again, each over a new line; to the successor
this stage dials again. What ends it is the owner, a broken rule, a failed step, or the end of the lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from farflung.core.errors import FarflungError, LeaseExceeded, ProtocolViolation, WireError
from farflung.core.ids import NodeId, SessionId
from farflung.core.messages import Close, Credit, Evicted, Fault, Grant, Ids, Message, Open, Renew, StageTime, Window
from farflung.engine.backend import StageResult, StageWork
from farflung.node.faults import fault_of, no_place
from farflung.node.meter import Meter
from farflung.node.opening import Opening, key_of
from farflung.node.ports import SessionHost
from farflung.node.row_log import RowLog
from farflung.node.successor import Successor, say_goodbye
from farflung.node.token_ids import check_vocabulary, only_buffer, token_ids
from farflung.protocol.events import (
    Forward,
    IdsReceived,
    OwnerAttached,
    OwnerLost,
    PredecessorUp,
    Reply,
    ReturnCredit,
    Settled,
    StageEvent,
    StepDone,
    StepStarted,
    TellHave,
    WindowReceived,
)
from farflung.protocol.outgoing import OutEdge
from farflung.protocol.receiving import check_ids
from farflung.protocol.stage import advance
from farflung.protocol.stage_state import ID_BYTES, StageState
from farflung.protocol.windows import slots_of
from farflung.transport.lines import Line, try_send
from farflung.transport.link import Buffer, Frame, Priority
from farflung.wire.codec import codec


@dataclass(eq=False)
class StageSession:
    """See the module. ``end`` is the only way out, and it may be called at any time, more than once.

    Attributes:
        host: the node.
        opening: the newest one.
        codec_out: how this stage codes its rows, from the first to the last: the log keeps them as they were sent.
        predecessor, owner: lines; None while broken.
        successor: the edge to the next stage; None at the tail.
        has_begun: the owner's line has been here.
        seen_s: last sign of the owner, on the loop's clock; ``owner_gone_s``: since when its line is broken.
    """

    host: SessionHost
    opening: Opening
    codec_out: str
    predecessor: Line | None = None
    owner: Line | None = None
    over: bool = False
    has_begun: bool = False
    seen_s: float = 0.0
    owner_gone_s: float | None = None
    meter: Meter = field(init=False)
    state: StageState = field(init=False)
    successor: Successor | None = field(init=False, default=None)
    log: RowLog | None = field(init=False, default=None)
    _step_queue_ms: float = 0.0

    def __post_init__(self) -> None:
        text, is_first, width = self.opening.text, self.opening.index == 0, self.host.hidden_size
        epoch_out = self.opening.epoch_out
        out = None
        if epoch_out is not None:
            out = OutEdge(epoch=epoch_out, row_bytes=codec(self.codec_out).row_bytes(width))
            self.successor = Successor(self)
            self.log = self.host.open_log(text.session, self._on_evicted)
        self.meter = Meter(self.host.node_id)
        self.seen_s = self.owner_gone_s = asyncio.get_running_loop().time()
        self.state = StageState(
            session=text.session,
            epoch=self.opening.epoch_in,
            row_bytes=ID_BYTES if is_first else codec(self.opening.message.codec).row_bytes(width),
            needs_ids=text.sampling.needs_history and out is None and not is_first,
            lease_tokens=text.lease_tokens,
            max_slots=self.host.max_slots,
            context_tokens=self.host.context_tokens,
            out=out,
            place=self.opening.index,
        )

    @property
    def id(self) -> SessionId:
        """Names it at this node."""
        return key_of(self.opening.text.session, self.opening.text.owner)

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
        if self.successor is not None and opening.epoch_out is not None and opening.epoch_out != was.epoch_out:
            with self._ending_on_errors():
                self.successor.replaced(opening.epoch_out)

    def attach(self, owner: Line) -> None:
        """The owner's own line is up: answers that it may have missed go out."""
        if self.owner is not owner:
            self._let_go(self.owner)
        self.owner, self.owner_gone_s, self.has_begun = owner, None, True
        self.seen_s = asyncio.get_running_loop().time()
        owner.bind(self)
        try_send(owner, Grant(self.state.max_slots))
        if self.log is not None and self.log.complete_from:
            try_send(owner, Evicted(self.log.complete_from))
        if self.successor is not None and self.successor.trouble is not None:
            try_send(owner, self.successor.trouble)
        self._feed_or_end(OwnerAttached())

    def release_owner(self) -> Line | None:
        """The owner's line, for the session that takes this one's place."""
        owner, self.owner = self.owner, None
        return owner

    async def connect(self) -> None:
        """See ``Successor.connect``. Ends the session where a rule is broken meanwhile."""
        if self.successor is not None:
            with self._ending_on_errors():
                await self.successor.connect()

    def connect_soon(self) -> None:
        self.host.connect(self)

    def tell_owner(self, message: Message) -> None:
        try_send(self.owner, message)

    def on_frame(self, line: Line, frame: Frame) -> None:
        message = frame.message
        try:
            if line is self.predecessor and isinstance(message, Window):
                self._receive(message, frame)
            elif line is self.owner:
                self._from_owner(line, frame)
            elif self.successor is not None and line is self.successor.line:
                self.successor.take(line, message)
            elif line is self.predecessor and isinstance(message, Close):
                # An attached owner decides itself; an owner that never came leaves it to the chain.
                self.predecessor = None
                line.release()
                if self.owner is None:
                    self.end(None)
            else:
                raise no_place(message, line)
        except (ProtocolViolation, WireError, LeaseExceeded) as error:
            self.end(error, at_fault=line.peer)
        except FarflungError as error:
            self.end(error)

    def _from_owner(self, line: Line, frame: Frame) -> None:
        message = frame.message
        self.seen_s = asyncio.get_running_loop().time()
        match message:
            case Close():
                self.end(None)
            case Renew():
                return
            case Open():
                self.host.reopen(self, message)
            case Ids():
                self._receive_ids(message, frame)
            case _:
                raise no_place(message, line)

    def on_lost(self, line: Line, error: FarflungError) -> None:
        if self.over:
            return
        if line is self.predecessor:
            self.predecessor = None
        if line is self.owner:
            self.owner = None
            self.owner_gone_s = asyncio.get_running_loop().time()
            self._feed_or_end(OwnerLost())
        if self.successor is not None and line is self.successor.line:
            with self._ending_on_errors():
                self.successor.on_lost()

    def _on_evicted(self, session: SessionId, complete_from: int) -> None:
        del session
        try_send(self.owner, Evicted(complete_from))

    # -- computing ---------------------------------------------------------------------------------------------------

    def start_step(self, max_rows: int) -> StageWork:
        """The work of the oldest waiting window, or of its first ``max_rows`` rows, now being computed."""
        self.feed(StepStarted(max_rows))
        pending = self.state.queue[0]
        window, payload = pending.window, pending.payload
        self._step_queue_ms = 1e3 * (asyncio.get_running_loop().time() - pending.at_s)
        is_first = self.opening.index == 0
        ids = token_ids(payload) if is_first else np.array(self.state.step_ids, dtype="<i4")
        return StageWork(
            session=self.id,
            runs=window.runs,
            commit=window.commit,
            token_ids=ids if is_first or self.state.needs_ids else None,
            rows=None if is_first else payload,
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
                self.log.append(slots, result.rows or b"")
            self.meter.computed(pending.window, slots, result.rows, step_ms)
            time = None if pending.window.timeline is None else self._stage_time(step_ms, step_rows)
            self.feed(StepDone(result.tokens, result.logprobs, queue_rows, time))
        except FarflungError as error:  # a broken rule, a link that is down or cannot take more
            self.end(error)

    def _stage_time(self, step_ms: float, step_rows: int) -> StageTime:
        round_trip_s = self.predecessor.link.stats.round_trip_s if self.predecessor is not None else None
        line = None if self.successor is None else self.successor.line
        rate = None if line is None else line.link.stats.delivery_bytes_per_s
        return StageTime((round_trip_s or 0.0) * 500, self._step_queue_ms, step_ms, step_rows, rate or 0.0)

    # -- ending ------------------------------------------------------------------------------------------------------

    def end(self, error: FarflungError | None, *, at_fault: NodeId | None = None) -> None:
        """Ends the session here. The owner hears a report or the fault; without an owner the predecessor relays the fault."""
        self.end_with(None if error is None else fault_of(error, at_fault or self.host.node_id))

    def end_with(self, fault: Fault | None) -> None:
        """``end`` by a fault as it travels."""
        if self.over:
            return
        self.over = True
        self.host.ended(self, fault)
        say_goodbye(self.successor)
        if self.owner is not None:
            try_send(self.owner, self.meter.report if fault is None else fault)
        if self.predecessor is not self.owner:  # it must not go on sending, and relays a fault where the owner has no line
            try_send(self.predecessor, Close("the session ended") if fault is None or self.owner is not None else fault)
        self._let_go(self.predecessor)
        self._let_go(self.owner)
        if self.log is not None:
            self.log.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _receive(self, window: Window, frame: Frame) -> None:
        payload = only_buffer(frame)
        if self.opening.index == 0:
            check_vocabulary(payload, self.host.vocab_size)
        self.seen_s = asyncio.get_running_loop().time()
        queued = len(self.state.queue)
        self.feed(WindowReceived(window, payload, self.seen_s))
        for pending in self.state.queue[queued:]:
            self.meter.received(slots_of(pending.window), pending.payload)

    def _receive_ids(self, message: Ids, frame: Frame) -> None:
        ids, count = only_buffer(frame), sum(span.count for span in message.slots)
        check_ids(self.state, count)
        if len(ids) != count * ID_BYTES:
            raise ProtocolViolation(f"the tokens of {count} slots came with {len(ids)} bytes")
        check_vocabulary(ids, self.host.vocab_size)
        slots = tuple(slot for span in message.slots for slot in span)
        self.feed(IdsReceived(slots, tuple(token_ids(ids).tolist())))

    def _feed_or_end(self, event: StageEvent) -> None:
        with self._ending_on_errors():
            self.feed(event)

    @contextmanager
    def _ending_on_errors(self) -> Iterator[None]:
        """A broken rule, or a link that cannot take more, ends the session."""
        try:
            yield
        except FarflungError as error:
            self.end(error)

    def feed(self, event: StageEvent) -> None:
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
        payload = self.log.payload(slots_of(window))
        line = None if self.successor is None else self.successor.line
        self._send(line, window, (payload,), is_decode=window.is_decode)

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

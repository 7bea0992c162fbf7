"""One session at this node: performs what the stage's state machine decides, over up to three lines.

predecessor --windows--> [ this stage ] --windows--> successor
                                └--answers, faults, report--> owner      (at the first stage the predecessor is the owner)
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from msgspec.structs import replace

from farflung.core.errors import Cancelled, FarflungError, ProtocolViolation, StageLost, error_from_code
from farflung.core.ids import NodeId, SessionId, short
from farflung.core.messages import Close, Credit, Fault, Message, Open, OpenText, Report, Window
from farflung.core.route import Hop
from farflung.engine.backend import StageResult, StageWork
from farflung.protocol.stage import (
    CreditReceived,
    Forward,
    OwnerAttached,
    Reply,
    ReturnCredit,
    StageEvent,
    StageState,
    StepDone,
    StepStarted,
    WindowReceived,
    advance,
)
from farflung.transport.lines import Line, LinkPool, try_send
from farflung.transport.link import Buffer, Frame, Priority
from farflung.wire.codec import codec

TOKEN_BYTES = 4


@dataclass(frozen=True)
class Opening:
    """A checked opening: the text, the signed message as it came (it travels on unchanged) and this stage's place."""

    text: OpenText
    message: Open
    index: int

    @property
    def successor(self) -> Hop | None:
        return self.text.route.successor(self.index)


class Meter:
    """Keeps the ``report`` of one session."""

    def __init__(self, node_id: NodeId) -> None:
        self.report = Report(node_id)

    def computed(self, window: Window, step_ms: float) -> None:
        """A window came back from a step of that time."""
        was, decode = self.report, int(window.is_decode)
        self.report = replace(
            was,
            windows=was.windows + 1,
            rows=was.rows + window.rows,
            compute_ms=was.compute_ms + step_ms,
            decode_windows=was.decode_windows + decode,
            decode_compute_ms=was.decode_compute_ms + step_ms * decode,
        )

    def sent(self, size: int, *, is_decode: bool) -> None:
        """A frame of ``size`` bytes went on."""
        was = self.report
        self.report = replace(was, bytes_out=was.bytes_out + size, decode_bytes_out=was.decode_bytes_out + size * is_decode)


class SessionHost(Protocol):
    """What a session needs of its node."""

    @property
    def node_id(self) -> NodeId: ...

    @property
    def pool(self) -> LinkPool: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    def ready(self, session: StageSession) -> None:
        """It has a window to compute."""

    def ended(self, session: StageSession, fault: Fault | None) -> None:
        """It is over: free its KV, remember its end."""


@dataclass(eq=False)
class StageSession:
    """See the module. ``end`` is the only way out, and it may be called at any time, more than once."""

    host: SessionHost
    opening: Opening
    predecessor: Line
    owner: Line | None = None
    successor: Line | None = None
    meter: Meter = field(init=False)
    over: bool = False
    active_s: float = 0.0
    state: StageState = field(init=False)
    _unsent: list[Forward] = field(default_factory=list)

    def __post_init__(self) -> None:
        text = self.opening.text
        is_first = self.opening.index == 0
        self.meter = Meter(self.host.node_id)
        self.state = StageState(
            session=text.session,
            epoch=text.epoch,
            is_first=is_first,
            is_tail=self.opening.successor is None,
            row_bytes=TOKEN_BYTES if is_first else codec(text.codec).row_bytes(self.host.hidden_size),
            lease_tokens=text.lease_tokens,
        )
        self.predecessor.bind(self)
        if is_first:
            self.attach(self.predecessor)

    @property
    def id(self) -> SessionId:
        return self.opening.text.session

    # -- lines -------------------------------------------------------------------------------------------------------

    def attach(self, owner: Line) -> None:
        """The owner's own line is up: held answers go out."""
        self.owner = owner
        owner.bind(self)
        self._feed_or_end(OwnerAttached())

    async def connect(self) -> None:
        """Opens the session at the next stage, then sends what was computed meanwhile. Ends the session where that fails."""
        hop = self.opening.successor
        if hop is None:
            return
        try:
            line = await self.host.pool.line(hop.node_id, self)
        except FarflungError as error:
            self.end(self._lost("cannot reach", hop.node_id, error), at_fault=hop.node_id)
            return
        if self.over:
            try_send(line, Close("the session ended"))
            line.release()
            return
        self.successor = line
        try:
            line.send(self.opening.message, (), Priority.PREFILL)
            unsent, self._unsent = self._unsent, []
            for forward in unsent:
                self._forward(forward)
        except FarflungError as error:  # the link is gone again, or will not take the rows
            self.end(self._lost("cannot send to", hop.node_id, error), at_fault=hop.node_id)

    def on_frame(self, line: Line, frame: Frame) -> None:
        message = frame.message
        try:
            match message:
                case Window() if line is self.predecessor:
                    self._receive(message, frame)
                case Credit() if line is self.successor:
                    self._feed(CreditReceived(message.bytes))
                case Fault() if line is self.successor:
                    on_route = any(hop.node_id == message.node_id for hop in self.opening.text.route.hops)
                    at_fault = message.node_id if on_route else line.peer
                    self.end(error_from_code(message.code, message.message, message.hint), at_fault=at_fault)
                case Close() if line is self.owner:
                    self.end(None)
                case Close() if line is self.predecessor:
                    # An attached owner decides itself; an owner that never came leaves it to the chain.
                    if self.owner is None:
                        self.end(None)
                case Close() if line is self.successor:
                    self.end(Cancelled(f"node {short(line.peer)} closed session {short(self.id)}"))
                case _:
                    raise ProtocolViolation(
                        f"a {type(message).__name__} from node {short(line.peer)} has no place on this line"
                    )
        except FarflungError as error:
            self.end(error)

    def on_lost(self, line: Line, error: FarflungError) -> None:
        self.end(self._lost("lost its link to", line.peer, error), at_fault=line.peer)

    # -- computing ---------------------------------------------------------------------------------------------------

    def start_step(self) -> StageWork:
        """The work of the oldest waiting window, now being computed."""
        pending = self.state.queue[0]
        self._feed(StepStarted())
        window, payload = pending.window, pending.payload
        return StageWork(
            session=self.id,
            runs=window.runs,
            commit=window.commit,
            token_ids=np.frombuffer(payload, dtype="<i4") if self.state.is_first else None,
            rows=None if self.state.is_first else payload,
            want=tuple(slot for span in window.want for slot in span),
        )

    def finish_step(self, result: StageResult, step_ms: float, queue_rows: int) -> None:
        """Takes the result of what ``start_step`` gave."""
        if self.over:
            return
        if result.error is not None:
            self.end(result.error)
            return
        self.meter.computed(self.state.queue[0].window, step_ms)
        self._feed_or_end(StepDone(result.rows, result.tokens, queue_rows, step_ms))

    def end(self, error: FarflungError | None, *, at_fault: NodeId | None = None) -> None:
        """Ends the session here. The owner hears a report or the fault; without an owner the predecessor relays it."""
        if self.over:
            return
        self.over = True
        self._unsent.clear()
        fault = None if error is None else fault_of(error, at_fault or self.host.node_id)
        self.host.ended(self, fault)
        try_send(self.successor, Close("the session ended"))
        if fault is None:
            try_send(self.owner, self.meter.report)
        else:
            try_send(self.owner or self.predecessor, fault)
        for line in (self.predecessor, self.owner, self.successor):
            if line is not None:
                line.release()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _receive(self, window: Window, frame: Frame) -> None:
        if len(frame.buffers) != 1:
            raise ProtocolViolation(f"a window carries {len(frame.buffers)} buffers, expected one")
        payload = memoryview(frame.buffers[0])
        if self.state.is_first and payload and len(payload) % TOKEN_BYTES == 0:
            ids = np.frombuffer(payload, dtype="<i4")
            if int(ids.min()) < 0 or int(ids.max()) >= self.host.vocab_size:
                raise ProtocolViolation(
                    f"token ids {ids.min()}..{ids.max()} are outside the vocabulary of {self.host.vocab_size}"
                )
        self.active_s = asyncio.get_running_loop().time()
        self._feed(WindowReceived(window, payload))

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
                    self._forward(effect)
                case Reply():
                    self._send(self.owner, effect.answer, (), is_decode=True)
                case ReturnCredit():
                    self.predecessor.send(Credit(effect.bytes))
        if self.state.ready is not None:
            self.host.ready(self)

    def _forward(self, forward: Forward) -> None:
        if self.successor is None:
            self._unsent.append(forward)
        else:
            self._send(self.successor, forward.window, (forward.payload,), is_decode=forward.window.is_decode)

    def _send(self, line: Line | None, message: Message, buffers: tuple[Buffer, ...], *, is_decode: bool) -> None:
        if line is None:
            return
        size = line.send(message, buffers, Priority.DECODE if is_decode else Priority.PREFILL)
        self.meter.sent(size, is_decode=is_decode)

    def _lost(self, what: str, peer: NodeId, error: FarflungError) -> StageLost:
        layers = next((f" (layers {hop.layers})" for hop in self.opening.text.route.hops if hop.node_id == peer), "")
        return StageLost(
            f"node {short(self.host.node_id)} {what} node {short(peer)}{layers}: {error}",
            hint=error.hint or "another node must take its layers",
        )


def fault_of(error: FarflungError, node_id: NodeId) -> Fault:
    """The error as it travels."""
    return Fault(node_id, error.code, error.message[:2000], error.hint[:2000])

"""The driver's lines to the stages of one route: dialled in parallel, taken up again when they break, and told goodbye.

To the first stage the line carries windows (the driver is its predecessor), to the others only what concerns the owner. Events
for the driver's state machine come out, windows go in; nothing is decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from farflung.core.errors import (
    Cancelled,
    FarflungError,
    LinkError,
    NotAdmitted,
    ProtocolViolation,
    StageLost,
    error_from_code,
)
from farflung.core.ids import NodeId, short
from farflung.core.messages import (
    Answer,
    Attach,
    Close,
    Credit,
    Evicted,
    Fault,
    Grant,
    Have,
    Ids,
    Message,
    Open,
    OpenText,
    Renew,
    Report,
    Trouble,
    Window,
)
from farflung.core.route import Hop
from farflung.core.window import SlotSpan
from farflung.identity.keys import Identity
from farflung.protocol.driver import AnswerReceived, DriverEvent, Failed, GrantReceived
from farflung.protocol.events import CreditReceived, HaveReceived, SuccessorLost, SuccessorUp
from farflung.protocol.opening import OPEN_CONTEXT, encode_open_text
from farflung.session.stage_line import StageLine
from farflung.swarm.reconnect import ReconnectConfig, dial_again
from farflung.transport.lines import Line, LinkPool, try_send
from farflung.transport.link import Frame, Priority

REPORT_WAIT_S = 0.5
"""How long the end of a generation waits for the stages' reports."""


@dataclass(frozen=True, kw_only=True)
class RingPorts:
    """Attributes:
    identity: the owner's key, which signs the opening.
    pool: the driver's links.
    random: for the waits between tries.
    reconnect: how broken lines are taken up again.
    """

    identity: Identity
    pool: LinkPool
    random: Random
    reconnect: ReconnectConfig = field(default_factory=ReconnectConfig)


class Ring:
    """``run`` it in a task; ``close`` it before that task is cancelled.

    Args:
        ports: see above.
        opening: names the route.
        on_event: takes what happens, and at which stage; may call ``send``.

    Attributes:
        stages: by node, in route order.
        reconnects: broken lines that were taken up again.
    """

    def __init__(self, ports: RingPorts, opening: OpenText, on_event: Callable[[DriverEvent, NodeId], None]) -> None:
        self._ports = ports
        self._opening = opening
        self._text = encode_open_text(opening)
        self._signature = ports.identity.sign(self._text, context=OPEN_CONTEXT)
        self._on_event = on_event
        self._first, self._tail = opening.route.hops[0], opening.route.tail
        self._group: asyncio.TaskGroup | None = None
        self._reported = asyncio.Event()
        self._closed = False
        self.stages = {hop.node_id: StageLine() for hop in opening.route.hops}
        self.reconnects = 0

    async def run(self) -> None:
        """Keeps the lines up until it is cancelled. What cannot be mended becomes a ``Failed`` event."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for hop in self._opening.route.hops:
                group.create_task(self._join(hop, again=False))
            while True:
                await asyncio.sleep(self._opening.lease_s / 3)
                self._tell_all(Renew())

    def send(self, window: Window, token_ids: Sequence[int]) -> None:
        """To the first stage. Where its line is gone the window is lost, and what it brought goes out again over the next."""
        line = self.stages[self._first.node_id].line
        if line is None or not line.link.is_up:
            return
        ids = np.array(token_ids, dtype="<i4").tobytes()
        try:
            line.send(window, (ids,), Priority.DECODE if window.is_decode else Priority.PREFILL)
        except LinkError as error:
            raise self._lost(self._first, "takes no more", error) from error

    def tell_ids(self, slots: tuple[SlotSpan, ...], token_ids: Sequence[int]) -> None:
        """To the tail. Where its line is gone they are lost, and go out again with all others when it is back."""
        line = self.stages[self._tail.node_id].line
        ids = np.array(token_ids, dtype="<i4").tobytes()
        try_send(line, Ids(slots), (ids,))

    async def close(self, reason: str, *, wait_for_reports: bool) -> None:
        """Ends the session at every stage, waits a moment for their reports where wanted, and lets the lines go."""
        self.say_goodbye(reason)
        self._closed = True
        if wait_for_reports and any(stage.line is not None for stage in self.stages.values()):
            try:
                async with asyncio.timeout(REPORT_WAIT_S):
                    await self._reported.wait()
            except TimeoutError:
                pass  # a report is a courtesy: the text is complete without it
        for stage in self.stages.values():
            stage.let_go()

    def say_goodbye(self, reason: str) -> None:
        """Closes the session at every stage. A second close finds nobody and is dropped there."""
        self._tell_all(Close(reason))

    # -- lines -------------------------------------------------------------------------------------------------------

    async def _join(self, hop: Hop, *, again: bool) -> None:
        """A line to one stage: the first prompt chunk leaves as soon as the first stage is up."""
        stage = self.stages[hop.node_id]
        ports = self._ports

        def wanted() -> NodeId | None:
            return hop.node_id if stage.line is None and not self._closed else None

        try:
            line = await dial_again(ports.pool, self, wanted, ports.reconnect, ports.random, patient=again)
            if line is None:
                return
            stage.take(line)
            self.reconnects += again
            if hop is self._first:
                line.send(Open(self._text, self._signature, asks_have=again), (), Priority.PREFILL)
                self._on_event(SuccessorUp(begins=not again), hop.node_id)
            else:
                line.send(Attach(self._opening.session))
        except NotAdmitted as error:  # it says itself what is missing
            self._on_event(Failed(error, hop.node_id), hop.node_id)
        except FarflungError as error:
            self._on_event(Failed(self._lost(hop, "cannot be reached", error), hop.node_id), hop.node_id)

    def on_lost(self, line: Line, error: FarflungError) -> None:
        del error  # why a later try fails is what counts
        stage = self.stages[line.peer]
        if stage.line is not line:
            return
        stage.let_go()
        self._check_reports()
        hop = self._opening.route.hop_of(line.peer)
        if hop is None or self._closed:
            return
        if hop is self._first:
            self._on_event(SuccessorLost(), hop.node_id)
        if self._group is not None:
            self._group.create_task(self._join(hop, again=True))

    def on_frame(self, line: Line, frame: Frame) -> None:
        try:
            self._take(line, frame.message)
        except FarflungError as error:
            self._on_event(Failed(error, line.peer), line.peer)

    def _take(self, line: Line, message: Message) -> None:
        stage = self.stages[line.peer]
        match message:
            case Answer() if line.peer == self._tail.node_id:
                self._on_event(AnswerReceived(message), line.peer)
            case Credit() if line.peer == self._first.node_id:
                self._on_event(CreditReceived(message.bytes), line.peer)
            case Have() if line.peer == self._first.node_id:
                self._on_event(HaveReceived(message), line.peer)
            case Grant():
                if not stage.granted:  # once for every line: a tail must not ask for all tokens again and again
                    stage.granted = True
                    is_tail = line.peer == self._tail.node_id != self._first.node_id
                    self._on_event(GrantReceived(line.peer, message.slots, is_tail), line.peer)
            case Fault() | Trouble():
                # A stage may blame another one of the route; who is none of it, it can only be itself.
                at_fault = line.peer if self._opening.route.hop_of(message.node_id) is None else message.node_id
                self._on_event(Failed(error_from_code(message.code, message.message, message.hint), at_fault), line.peer)
            case Evicted():
                stage.complete_from = message.complete_from
            case Report():
                stage.report = message
                self._check_reports()
            case Close():
                closed = Cancelled(f"node {short(line.peer)} closed the session: {message.reason[:200]}")
                self._on_event(Failed(closed, line.peer), line.peer)
            case _:
                raise ProtocolViolation(f"a {type(message).__name__} from node {short(line.peer)} means nothing here")

    def _check_reports(self) -> None:
        if all(stage.report is not None or stage.line is None for stage in self.stages.values()):
            self._reported.set()

    def _tell_all(self, message: Message) -> None:
        for stage in self.stages.values():
            try_send(stage.line, message)

    def _lost(self, hop: Hop, what: str, error: FarflungError) -> StageLost:
        return StageLost(
            f"node {short(hop.node_id)} (layers {hop.layers}) {what}: {error}",
            hint="start another node for these layers, or try again over another route",
        )

"""The edge from one session to the next stage: taken up at first, after every broken line, and when the owner names another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from msgspec.structs import replace

from farflung.core.errors import FarflungError, LogEvicted, ProtocolViolation, StageLost
from farflung.core.ids import NodeId, SessionId, short
from farflung.core.messages import Close, Credit, Fault, Have, Message, Trouble
from farflung.node.faults import fault_of, no_place
from farflung.node.opening import Opening
from farflung.node.ports import SessionHost
from farflung.protocol.events import CreditReceived, HaveReceived, StageEvent, SuccessorLost, SuccessorReplaced, SuccessorUp
from farflung.swarm.reconnect import dial_again
from farflung.transport.lines import Line, LineHandler, try_send
from farflung.transport.link import Priority


class Upstream(LineHandler, Protocol):
    """The session at this stage, as its edge to the next one sees it."""

    host: SessionHost
    opening: Opening
    codec_out: str
    over: bool

    @property
    def id(self) -> SessionId: ...

    @property
    def has_begun(self) -> bool:
        """The owner has been here: it decides what becomes of the session."""

    def feed(self, event: StageEvent) -> None:
        """Raises FarflungError where a rule is broken or a link takes no more."""

    def connect_soon(self) -> None:
        """Run ``Successor.connect`` in a task."""

    def tell_owner(self, message: Message) -> None: ...

    def end(self, error: FarflungError | None, *, at_fault: NodeId | None = None) -> None: ...

    def end_with(self, fault: Fault | None) -> None: ...


class Successor:
    """Of a session that is not at the tail.

    Attributes:
        line: to the next stage; None while broken.
        trouble: why there is none, once nothing more is tried; the owner has been told.
    """

    def __init__(self, session: Upstream) -> None:
        self._session = session
        self._connecting = False
        self._begun_epoch = 0  # of the edge on which the next stage was opened already
        self._rejoins = session.opening.message.asks_have  # of the first opening: a newer one may come before this edge is up
        self.line: Line | None = None
        self.trouble: Trouble | None = None

    async def connect(self) -> None:
        """Takes the edge up, and what was computed meanwhile goes out. Where that fails, the owner is told: it may give the
        session another route. A stage where it was never open is not worth the wait, and the session ends."""
        if self._connecting:
            return  # that one asks again whom to dial
        self._connecting = True
        try:
            while self.trouble is None and (peer := self._missing()) is not None:
                await self._connect_to(peer)
        finally:
            self._connecting = False

    def replaced(self, epoch: int) -> None:
        """The owner's newer opening names another stage, or the same that begins anew. Raises as ``feed``."""
        self.let_go()
        self.trouble = None
        self._session.feed(SuccessorReplaced(epoch))
        self._session.connect_soon()

    def on_lost(self) -> None:
        """The line broke. Raises as ``feed``."""
        self.let_go()
        self._session.feed(SuccessorLost())
        self._session.connect_soon()

    def take(self, line: Line, message: Message) -> None:
        """What the next stage says. Raises ProtocolViolation, and as ``feed``."""
        match message:
            case Credit():
                self._session.feed(CreditReceived(message.bytes))
            case Have():
                with self._log_complete():
                    self._session.feed(HaveReceived(message))
            case Fault():
                hop = self._session.opening.text.route.hop_of(message.node_id)
                self._ended(replace(message, node_id=line.peer if hop is None else hop.node_id))
            case Close():
                self._ended(fault_of(StageLost(f"node {short(line.peer)} closed session {short(self._session.id)}"), line.peer))
            case _:
                raise no_place(message, line)

    def let_go(self) -> None:
        """Releases the line, if there is one."""
        if self.line is not None:
            self.line.release()
            self.line = None

    def _missing(self) -> NodeId | None:
        hop = self._session.opening.successor
        return None if self._session.over or self.line is not None or hop is None else hop.node_id

    async def _connect_to(self, peer: NodeId) -> None:
        host, first = self._session.host, self._begun_epoch == 0
        try:
            line = await dial_again(host.pool, self._session, self._missing, host.reconnect, host.random, patient=not first)
            if line is not None:
                with self._log_complete():
                    self._open(line)
        except FarflungError as error:  # out of reach, or the link is gone again
            hop = self._session.opening.successor
            if self._session.over or hop is None or hop.node_id != peer:
                return  # the owner has named another meanwhile
            lost = StageLost(
                f"node {short(host.node_id)} cannot reach node {short(peer)} (layers {hop.layers}): {error}",
                hint=error.hint or "another node must take its layers",
            )
            if first:
                self._session.end(lost, at_fault=peer)
                return
            self._give_up(fault_of(lost, peer))

    @contextmanager
    def _log_complete(self) -> Iterator[None]:
        """Where this stage's log lacks rows that the next one needs, the owner is told: it may begin at an earlier log."""
        try:
            yield
        except LogEvicted as error:
            self._give_up(fault_of(error, self._session.host.node_id))

    def _open(self, line: Line) -> None:
        opening, epoch = self._session.opening, self._session.opening.epoch_out
        if opening.successor is None or epoch is None:
            raise ProtocolViolation("the tail has no successor")
        # A node that enters the route with this edge holds nothing yet and need not be asked - unless this stage was itself
        # asked, because it was restarted: the next one may hold much.
        begins = self._begun_epoch < epoch == opening.successor.epoch and not self._rejoins
        self.line, self._begun_epoch = line, epoch
        line.send(replace(opening.message, codec=self._session.codec_out, asks_have=not begins), (), Priority.PREFILL)
        self._session.feed(SuccessorUp(begins))

    def _ended(self, fault: Fault) -> None:
        """The session is over there. The owner decides what becomes of it; where it has never been, it is over here, too."""
        if not self._session.has_begun:
            self._session.end_with(fault)
            return
        self._give_up(fault)

    def _give_up(self, fault: Fault) -> None:
        """Nothing more is tried until the owner says what is to be done."""
        self.let_go()
        self._session.feed(SuccessorLost())
        self.trouble = Trouble(fault.node_id, fault.code, fault.message, fault.hint)
        self._session.tell_owner(self.trouble)


def say_goodbye(successor: Successor | None) -> None:
    """The session is over here: it is over there, too."""
    if successor is not None:
        try_send(successor.line, Close("the session ended"))
        successor.let_go()

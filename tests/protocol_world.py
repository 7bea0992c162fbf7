"""A driver, three stages and the lines between them as values, for tests of the protocol's rules: no clock, loop or tensors.

What decides is the code that serves: ``protocol.outgoing`` and ``TokenTree`` on the driver's side (``protocol_driver``),
``protocol.stage``, ``SessionCells`` and ``Meter`` on the stages' (``protocol_session``). What a node does around them is
repeated there in the fewest words. A stage's "layers" are a hash over what ``SessionCells`` says that a row sees, so that a
wrong mask, a lost row, a wrong position or a stale cell gives another answer.
"""

from __future__ import annotations

from itertools import pairwise

from msgspec.structs import replace
from protocol_driver import Driver
from protocol_lines import STAGES, Carried, EdgeLine, OwnerLine, Shape
from protocol_session import Session

from farflung.core.ids import NodeId
from farflung.core.messages import Credit
from farflung.core.model import LayerRange
from farflung.core.route import Hop, Route
from farflung.protocol.credit import WINDOW_COST_BYTES
from farflung.protocol.outgoing import EdgeStatus

Sender = Driver | Session


class World:
    """The whole of it. A stage is None where its node knows nothing of the session (yet, or any more)."""

    def __init__(self, shape: Shape) -> None:
        hops = tuple(Hop(NodeId(f"{index:064x}"), LayerRange(index, index + 1)) for index in range(STAGES))
        self.shape = shape
        self.route = Route(hops)
        self.nodes = STAGES
        self.driver = Driver(shape, self.route)
        self.stages: list[Session | None] = [None] * STAGES
        self.lines: list[list[EdgeLine]] = [[] for _ in range(STAGES)]
        """To each stage: every connection that may still bring something."""

    def sender(self, edge: int) -> Sender | None:
        return self.driver if edge == 0 else self.stages[edge - 1]

    # -- what goes on ------------------------------------------------------------------------------------------------

    def may_connect(self, edge: int) -> bool:
        sender = self.sender(edge)
        if sender is None or sender.route.hops[edge] != self.route.hops[edge]:
            return False  # it dials a node that is gone
        return sender.successor is None

    def connect(self, edge: int) -> None:
        sender = self.sender(edge)
        assert sender is not None
        self.lines[edge].append(sender.connect())

    def may_deliver(self, edge: int) -> list[EdgeLine]:
        self.lines[edge] = [line for line in self.lines[edge] if not line.silent or self.is_current(edge, line)]
        return [line for line in self.lines[edge] if line.there]

    def is_current(self, edge: int, line: EdgeLine) -> bool:
        sender, receiver = self.sender(edge), self.stages[edge]
        at_sender = sender is not None and line is sender.successor
        return at_sender or (receiver is not None and receiver.predecessor is line)

    def deliver(self, edge: int, line: EdgeLine, overtakes: int = 0) -> None:
        """The next frame, or one of those behind it where windows may overtake each other."""
        at = 0
        if isinstance(line.there[0], Carried):
            at = overtakes % min(4, len(line.there))
        frame, stage = line.there.pop(at), self.stages[edge]
        if isinstance(frame, Carried):
            if stage is not None and stage.predecessor is line:
                stage.receive(frame)
            return  # else it came too late
        if frame.route.hops[edge] != self.route.hops[edge]:
            return  # to a node that is gone
        if stage is None:
            stage = self.stages[edge] = Session(self.shape, edge, frame.route, rejoins=frame.asks_have)
        elif frame.route.edge_epoch(edge) < stage.route.edge_epoch(edge):
            return  # refused
        stage.take_up(line, frame)
        if edge == STAGES - 1 and stage.owner is not self.driver.tail:
            stage.attach(self.driver.tail)
            self.driver.tell_ids()

    def may_hear(self, edge: int) -> EdgeLine | None:
        sender = self.sender(edge)
        line = None if sender is None else sender.successor
        return line if line is not None and line.back else None

    def hear(self, edge: int) -> None:
        sender, line = self.sender(edge), self.may_hear(edge)
        assert sender is not None
        assert line is not None
        sender.hear(line.back.pop(0))

    def attach(self) -> None:
        """The owner's line to the tail, again."""
        self.driver.tail = OwnerLine()
        if (tail := self.stages[-1]) is not None:
            tail.attach(self.driver.tail)
            self.driver.tell_ids()

    def tell(self) -> None:
        """The next ids on the owner's line reach the tail."""
        line, tail = self.driver.tail, self.stages[-1]
        assert line is not None
        told = line.there.pop(0)
        if tail is not None and tail.owner is line:
            tail.hear_ids(*told)

    # -- what breaks -------------------------------------------------------------------------------------------------

    def silence(self, edge: int) -> None:
        sender = self.sender(edge)
        line = None if sender is None else sender.successor
        if line is not None:
            line.lose()

    def is_silent(self, edge: int) -> bool:
        """Whether the line is dead and its sender has not noticed."""
        sender = self.sender(edge)
        return sender is not None and sender.successor is not None and sender.successor.silent

    def send_twice(self, edge: int) -> None:
        """The sender gives its last window a second time, and pays for it."""
        sender = self.sender(edge)
        line = None if sender is None else sender.successor
        if sender is None or sender.out is None or line is None or not line.there or not sender.out.credit.may_send:
            return
        if isinstance(frame := line.there[-1], Carried):
            out = replace(sender.out, credit=sender.out.credit.spend(frame.cost - WINDOW_COST_BYTES))
            if isinstance(sender, Driver):
                sender.out = out
            else:
                sender.state = replace(sender.state, out=out)
            line.send_again(frame)

    def cut(self, edge: int) -> None:
        self.silence(edge)
        sender, receiver = self.sender(edge), self.stages[edge]
        if receiver is not None and receiver.predecessor is not None and receiver.predecessor.silent:
            receiver.predecessor = None
        if sender is not None and not self.may_connect(edge):
            sender.lose_successor()

    def cut_owner(self, *, tail_knows: bool) -> None:
        if (line := self.driver.tail) is not None:
            line.silent = True
            line.there.clear()
            line.back.clear()
            self.driver.tail = None
            if tail_knows and (tail := self.stages[-1]) is not None:
                tail.attach(None)

    def restart(self, index: int) -> None:
        """The node comes back and knows nothing; the route stays."""
        if index == STAGES - 1:
            self.cut_owner(tail_knows=False)
        if index + 1 < STAGES:
            self.cut(index + 1)
        self.stages[index] = None
        self.cut(index)

    def replace(self, index: int, *, politely: bool) -> None:
        """Another node takes the place under a new epoch. ``politely``: what the old one sent may still arrive."""
        old, epoch = self.stages[index], self.route.epoch + 1
        line = None if old is None else old.successor
        if line is not None and not politely:
            line.lose()
        if index == STAGES - 1:
            self.cut_owner(tail_knows=False)
        self.stages[index] = None
        self.nodes += 1
        hop = replace(self.route.hops[index], node_id=NodeId(f"{self.nodes:064x}"), epoch=epoch)
        self.route = Route((*self.route.hops[:index], hop, *self.route.hops[index + 1 :]))
        self.driver.adopt(self.route)

    def may_adopt(self, index: int) -> bool:
        stage = self.stages[index]
        return stage is not None and stage.route is not self.route

    def adopt(self, index: int) -> None:
        """The owner's newer opening comes over its own line."""
        stage = self.stages[index]
        assert stage is not None
        stage.adopt(self.route)

    # -- what must hold ----------------------------------------------------------------------------------------------

    def check_credit(self) -> None:
        """What one end has is what the other gave: where the line is up and both know it."""
        for edge in range(STAGES):
            sender, receiver = self.sender(edge), self.stages[edge]
            if sender is None:
                continue
            out, line = sender.out, sender.successor
            if out is None or line is None or line.silent or out.status is not EdgeStatus.UP:
                continue
            if receiver is None or receiver.predecessor is not line:
                continue
            there = sum(frame.cost for frame in line.there if isinstance(frame, Carried))
            back = sum(message.bytes for message in line.back if isinstance(message, Credit))
            assert out.credit.left + there + back == receiver.state.receiver.left

    def check_rest(self) -> None:
        """All lines are up and nothing moves any more."""
        driver, stages = self.driver, [stage for stage in self.stages if stage is not None]
        assert len(stages) == STAGES
        assert not driver.unanswered, f"slots {sorted(driver.unanswered)} wait for ever"
        if driver.is_owed_all and not self.shape.overtaking:  # the last window was a header, or wanted an answer for every row
            assert driver.covered == driver.tree.next_slot, "slots stay in flight for ever"
            assert driver.acked == driver.tree.committed_tokens
        for stage in stages:
            state = stage.state
            assert (state.queue, state.early) == ((), ())
            for tree in (state.tree, stage.cells.tree):
                assert tree.committed == driver.tree.committed
                assert tree.alive.keys() == driver.tree.alive.keys()
            assert state.computed.committed == driver.tree.committed
            assert state.out is None or state.out.waiting == ()
        reports = [stage.meter.report for stage in stages]
        for left, right in pairwise(reports):
            assert left.committed_tokens == right.committed_tokens == driver.tree.committed_tokens
            assert left.digest_out == right.digest_in or not left.committed_tokens
        self.check_credit()

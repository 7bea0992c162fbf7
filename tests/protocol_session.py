"""One session at one stage without a node; see ``protocol_world``."""

from __future__ import annotations

from protocol_lines import CORE, STAGES, Carried, EdgeLine, Opened, OwnerLine, Shape, id_bytes, layers, token_of

from farflung.core.ids import SessionId
from farflung.core.messages import Credit, Have
from farflung.core.route import Route
from farflung.engine.kv_pool import NewRows, SessionCells
from farflung.node.meter import Meter
from farflung.protocol.credit import INITIAL_CREDIT_BYTES, WINDOW_COST_BYTES
from farflung.protocol.events import (
    CreditReceived,
    Forward,
    HaveReceived,
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
    SuccessorLost,
    SuccessorReplaced,
    SuccessorUp,
    TellHave,
    WindowReceived,
)
from farflung.protocol.limits import MAX_EARLY_WINDOWS
from farflung.protocol.outgoing import OutEdge
from farflung.protocol.stage import advance
from farflung.protocol.stage_state import PendingWindow, StageState
from farflung.protocol.windows import slots_of


class Session:
    """One session at one stage: what ``StageSession``, ``TorchBackend`` and ``RowLog`` do, in the fewest words."""

    def __init__(self, shape: Shape, index: int, route: Route, *, rejoins: bool) -> None:
        self.shape = shape
        self.index = index
        self.route = route
        self.rejoins = rejoins
        is_tail = index == STAGES - 1
        out = None if is_tail else OutEdge(epoch=route.edge_epoch(index + 1), row_bytes=shape.cost(index + 1))
        self.state = StageState(
            session=SessionId("0" * 32),
            epoch=route.edge_epoch(index),
            row_bytes=shape.row_bytes(index),
            needs_ids=shape.tells_ids and is_tail,
            lease_tokens=shape.lease + shape.slack,
            max_slots=shape.grant + shape.slack,
            context_tokens=100_000,
            out=out,
        )
        self.cells = SessionCells(self.state.lease_tokens)
        self.kv = [b"stale"] * self.state.lease_tokens
        self.log: dict[int, bytes] = {}
        self.meter = Meter(route.hops[index].node_id)
        self.was_computed: set[int] = set()
        self.work: PendingWindow | None = None
        self.predecessor: EdgeLine | None = None
        self.successor: EdgeLine | None = None
        self.owner: OwnerLine | None = None
        self.begun_epoch = 0
        self.acked = 0

    @property
    def out(self) -> OutEdge | None:
        return self.state.out

    # -- lines -------------------------------------------------------------------------------------------------------

    def take_up(self, line: EdgeLine, opened: Opened) -> None:
        if opened.route.epoch > self.route.epoch:
            self.adopt(opened.route)
        self.predecessor = line
        self.feed(PredecessorUp(self.route.edge_epoch(self.index), opened.asks_have))

    def adopt(self, route: Route) -> None:
        was, self.route, index = self.route, route, self.index
        if route.edge_epoch(index) > was.edge_epoch(index):
            self.predecessor = None
        if self.state.out is not None and route.edge_epoch(index + 1) != was.edge_epoch(index + 1):
            self.successor = None
            self.feed(SuccessorReplaced(route.edge_epoch(index + 1)))

    def connect(self) -> EdgeLine:
        line, epoch = EdgeLine(), self.route.edge_epoch(self.index + 1)
        begins = not self.rejoins and self.begun_epoch < epoch == self.route.hops[self.index + 1].epoch
        self.successor, self.begun_epoch = line, epoch
        line.send(Opened(self.route, not begins))
        self.feed(SuccessorUp(begins))
        return line

    def lose_successor(self) -> None:
        self.successor = None
        self.feed(SuccessorLost())

    def attach(self, line: OwnerLine | None) -> None:
        self.owner = line
        self.feed(OwnerLost() if line is None else OwnerAttached())

    # -- events ------------------------------------------------------------------------------------------------------

    def receive(self, frame: Carried) -> None:
        queued = len(self.state.queue)
        self.feed(WindowReceived(frame.window, frame.payload, at_s=1.0))
        for pending in self.state.queue[queued:]:
            assert pending.at_s == 1.0
            self.meter.received(slots_of(pending.window), pending.payload)

    def hear(self, message: Have | Credit) -> None:
        self.feed(HaveReceived(message) if isinstance(message, Have) else CreditReceived(message.bytes))

    def hear_ids(self, slots: list[int], ids: list[int]) -> None:
        self.feed(IdsReceived(tuple(slots), tuple(ids)))

    def start(self, max_rows: int) -> None:
        self.feed(StepStarted(max_rows))
        self.work = self.state.queue[0]
        assert all(self.state.tree.holds(slot) for slot in slots_of(self.work.window)), "a row was computed that is known dead"

    def finish(self, piece: int) -> None:
        work, self.work = self.work, None
        assert work is not None
        assert work is self.state.queue[0], "what is being computed is no longer what is done next"
        slots = slots_of(work.window)
        rows = self.compute(work, piece)
        self.was_computed.update(slots)
        tokens: tuple[int, ...] = ()
        coded = [row * self.shape.width for row in rows]
        if self.state.is_tail:
            by_slot = dict(zip(slots, map(token_of, rows), strict=True))
            tokens = tuple(by_slot[slot] for span in work.window.want for slot in span)
        else:
            assert self.log.keys().isdisjoint(slots), "a slot is logged twice"
            self.log.update(zip(slots, coded, strict=True))
        self.meter.computed(work.window, slots, None if self.state.is_tail else b"".join(coded), 1.0)
        self.feed(StepDone(tokens))

    def compute(self, work: PendingWindow, piece: int) -> list[bytes]:
        """As ``TorchBackend`` does: the whole window takes its cells, then some rows at a time meet the pool."""
        rows = self.cells.apply(work.window.runs, work.window.commit)
        size, ids = self.state.row_bytes, self.state.step_ids
        found: list[bytes] = []
        for start in range(0, len(rows.slots), piece):
            part = rows.part(start, min(start + piece, len(rows.slots)))
            for row, cell in enumerate(part.cells.tolist(), start):
                self.kv[cell] = bytes(work.payload[row * size : row * size + min(size, CORE)])
                if self.state.needs_ids:
                    self.kv[cell] += id_bytes(ids[row])
            for cells in self.seen_by(part):
                cells.sort(key=lambda cell: int(self.cells.position_of_cell[cell]))
                found.append(layers(self.index, [self.kv[cell] for cell in cells]))
        return found

    def seen_by(self, part: NewRows) -> list[list[int]]:
        masks = [[int(cell) for cell in mask.nonzero()[0]] for mask in self.cells.visible(part)]
        keys = self.cells.slice_keys(part)
        if keys is not None:
            assert masks == [list(range(keys - len(masks) + row + 1)) for row in range(len(masks))], "slice and mask differ"
        return masks

    def feed(self, event: StageEvent) -> None:
        self.state, effects = advance(self.state, event)
        for effect in effects:
            match effect:
                case Forward(window):
                    slots = slots_of(window)
                    if self.successor is not None:
                        self.successor.send(Carried(window, b"".join(self.log[slot] for slot in slots)))
                case Reply(answer):
                    assert answer.committed_tokens >= self.acked
                    self.acked = answer.committed_tokens
                    if self.owner is not None and not self.owner.silent:
                        self.owner.back.append(answer)
                case ReturnCredit(size):
                    if self.predecessor is not None:
                        self.predecessor.reply(Credit(size))
                case TellHave(have):
                    if self.predecessor is not None:
                        self.predecessor.tell(have, self.state.tree)
                case Settled():
                    self.meter.settled(effect, is_tail=self.state.is_tail)
                    self.was_computed -= effect.died
                    for slot in effect.died:
                        self.log.pop(slot, None)
        self.check()

    def check(self) -> None:
        """What holds after every event."""
        state = self.state
        assert max(self.cells.tree.tokens, state.tree.tokens) <= state.lease_tokens
        assert len(state.early) <= MAX_EARLY_WINDOWS
        assert all(slot == state.tree.root or slot in state.tree.alive for slot in state.wanted)
        assert len(state.answers) <= state.max_slots + 1
        assert len(state.ids) <= state.lease_tokens + state.max_slots
        queued = sum(pending.credit_bytes for pending in state.queue)
        queued += sum(len(early.payload) + WINDOW_COST_BYTES for early in state.early)
        assert state.receiver.left + state.receiver.owed + queued == INITIAL_CREDIT_BYTES
        assert all(state.computed.holds(slot) for slot in self.was_computed)
        if state.out is not None:
            assert self.log.keys() == self.was_computed, "the log holds other rows than those that may be asked for"

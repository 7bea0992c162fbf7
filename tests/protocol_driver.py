"""A driver that grows token trees at random, without lines of its own; see ``protocol_world``."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace
from protocol_lines import STAGES, Carried, EdgeLine, Opened, OwnerLine, Shape, id_bytes, layers, token_of

from farflung.core.messages import Answer, Credit, Have, Window
from farflung.core.route import Route
from farflung.core.tree import TokenTree
from farflung.protocol import outgoing
from farflung.protocol.outgoing import OutEdge
from farflung.protocol.stage_state import ID_BYTES
from farflung.protocol.windows import Given, slots_of


class Driver:
    """Grows a tree at random. Ids are random, too: what the tail answers is checked, not followed."""

    def __init__(self, shape: Shape, route: Route) -> None:
        self.shape = shape
        self.route = route
        self.tree = TokenTree()
        self.parents: dict[int, int] = {}
        self.ids: list[int] = []
        self.out = OutEdge(epoch=route.edge_epoch(0), row_bytes=ID_BYTES)
        self.successor: EdgeLine | None = None
        self.tail: OwnerLine | None = None
        self.begun_epoch = 0
        self.wanted: frozenset[int] = frozenset()
        self.answered: set[int] = set()
        self.covered = 0
        self.acked = 0
        self.is_owed_all = True
        self._rows: dict[tuple[int, int], bytes] = {}

    # -- lines -------------------------------------------------------------------------------------------------------

    def adopt(self, route: Route) -> None:
        was, self.route = self.route, route
        if route.edge_epoch(0) != was.edge_epoch(0):
            self.successor = None
            self.out = OutEdge(epoch=route.edge_epoch(0), row_bytes=ID_BYTES)

    def connect(self) -> EdgeLine:
        line = self.successor = EdgeLine()
        begins, self.begun_epoch = self.begun_epoch < self.route.edge_epoch(0), self.route.edge_epoch(0)
        line.send(Opened(self.route, not begins))
        if begins:
            self.out = outgoing.begin(self.out, Given(self.tree, self.tree, self.wanted))
        else:
            self.out = outgoing.ask(self.out)
        self.flush()
        return line

    def lose_successor(self) -> None:
        self.successor = None
        self.out = outgoing.lost(self.out)

    def hear(self, message: Have | Credit) -> None:
        if isinstance(message, Have):
            self.out = outgoing.resume(self.out, message, Given(self.tree, self.tree, self.wanted))
        else:
            self.out = outgoing.refill(self.out, message.bytes)
        self.flush()

    # -- windows -----------------------------------------------------------------------------------------------------

    def send(self, window: Window, ids: Sequence[int]) -> None:
        """The next window, as its tree grows by it."""
        self.ids += ids
        for run in window.runs:
            self.parents.update(run.pairs())
        tree, _ = self.tree.add(window.runs)
        if window.commit is not None:
            tree, _ = tree.commit(window.commit)
        self.tree = tree
        wanted = self.wanted.union(slot for span in window.want for slot in span)
        self.wanted = frozenset(slot for slot in wanted if slot == tree.root or slot in tree.alive)
        self.is_owed_all = sum(span.count for span in window.want) == window.rows
        window = replace(window, epoch=self.out.epoch, next_slot=tree.next_slot)
        self.out = outgoing.push(self.out, window, tree)
        self.flush()
        self.tell_ids(slots_of(window))

    def tell_ids(self, slots: Sequence[int] | None = None) -> None:
        """To the tail where it looks at them; None: all, because its line is new."""
        if not self.shape.tells_ids or self.tail is None or self.tail.silent:
            return
        if slots is None:
            slots = [*(slot for span in self.tree.committed for slot in span), *self.tree.alive]
        self.tail.there.append((list(slots), [self.ids[slot] for slot in slots]))

    def flush(self) -> None:
        self.out, windows = outgoing.flush(self.out, self.tree)
        for window in windows:
            payload = b"".join(id_bytes(self.ids[slot]) for slot in slots_of(window))
            if self.successor is not None:
                self.successor.send(Carried(window, payload))

    # -- answers -----------------------------------------------------------------------------------------------------

    def take(self, answer: Answer) -> None:
        """Checks each token against one that is computed from scratch."""
        assert answer.next_slot <= self.tree.next_slot
        assert answer.committed_tokens <= self.tree.committed_tokens
        slots = [slot for span in answer.slots for slot in span]
        assert len(slots) == len(answer.tokens)
        for slot, token in zip(slots, answer.tokens, strict=True):
            assert token == token_of(self.row(slot, STAGES - 1)), f"the answer for slot {slot} is wrong"
        self.answered.update(slots)
        self.covered = max(self.covered, answer.next_slot)
        self.acked = max(self.acked, answer.committed_tokens)

    def row(self, slot: int, stage: int) -> bytes:
        """What the stage gives for the slot, from the tokens of its path alone."""
        found = self._rows.get((slot, stage))
        if found is None:
            path = [slot]
            while (parent := self.parents[path[-1]]) >= 0:
                path.append(parent)
            seen = [id_bytes(self.ids[at]) if stage == 0 else self.row(at, stage - 1) for at in reversed(path)]
            if stage == STAGES - 1 and self.shape.tells_ids:
                seen = [row + id_bytes(self.ids[at]) for row, at in zip(seen, reversed(path), strict=True)]
            found = self._rows[slot, stage] = layers(stage, seen)
        return found

    @property
    def given(self) -> Given:
        return Given(self.tree, self.tree, self.wanted)

    @property
    def unanswered(self) -> set[int]:
        return set(self.wanted) - self.answered

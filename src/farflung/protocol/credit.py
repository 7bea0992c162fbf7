"""Hop credit and slot credit (DESIGN.md, rule 8).

Hop credit: how many bytes of windows may be on their way over one edge. Both ends start from the same constant, so the first
window needs no round trip. A window costs its payload and a little more. A sender may send while its credit is positive - one
window may overdraw it, so a window larger than the grant still gets through - and the receiver returns what it has computed, in
lumps: a decode row costs no extra frame. Where an edge is taken up again after a broken line, the receiver says what it can
take, less what it still has to compute.

Slot credit: how many slots of the token tree the driver may have in flight. Every stage grants a number when the owner's line
is up, the least of them counts, and a slot is in flight until the tail's ``next_slot`` has passed it. Prompts need none: hop
credit covers them, and their slots are committed by the window that brings them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from msgspec import Struct, field
from msgspec.structs import replace

from farflung.core.errors import ProtocolViolation
from farflung.core.ids import NodeId
from farflung.core.tree import TokenTree

INITIAL_CREDIT_BYTES = 1024**2
"""Of each edge. Some 100 ms of a 100 Mbps uplink; times the sessions of a node it must stay within a link's queue."""

WINDOW_COST_BYTES = 256
"""Charged for every window beside its payload: a window without rows takes room in queues, too."""

RETURN_AT_BYTES = INITIAL_CREDIT_BYTES // 4

INITIAL_SLOTS = 64
"""Slots in flight before a stage has granted any."""


class SenderCredit(Struct, frozen=True):
    """The sending end of an edge."""

    left: int = INITIAL_CREDIT_BYTES

    @classmethod
    def told(cls, left: int) -> SenderCredit:
        """What the receiver of a resumed edge lets us send. Raises ProtocolViolation out of range."""
        if left > INITIAL_CREDIT_BYTES:
            raise ProtocolViolation(f"a credit of {left} bytes is over the grant of {INITIAL_CREDIT_BYTES}")
        return cls(left)

    @property
    def may_send(self) -> bool:
        return self.left > 0

    def spend(self, payload: int) -> SenderCredit:
        """A window with ``payload`` bytes goes out."""
        return SenderCredit(self.left - payload - WINDOW_COST_BYTES)

    def refill(self, size: int) -> SenderCredit:
        """Raises ProtocolViolation for a grant out of range."""
        if size <= 0 or self.left + size > INITIAL_CREDIT_BYTES:
            raise ProtocolViolation(
                f"a credit of {size} bytes would make {self.left + size}, over the grant of {INITIAL_CREDIT_BYTES}"
            )
        return SenderCredit(self.left + size)


class ReceiverCredit(Struct, frozen=True):
    """The receiving end: what the peer may still send, and what was computed and not returned yet."""

    left: int = INITIAL_CREDIT_BYTES
    owed: int = 0

    @classmethod
    def resumed(cls, queued: int) -> ReceiverCredit:
        """For the new line of an edge; ``queued``: the cost of the windows that came over the old one and are not computed."""
        return cls(INITIAL_CREDIT_BYTES - queued)

    def receive(self, payload: int) -> ReceiverCredit:
        """A window with ``payload`` bytes came. Raises ProtocolViolation where the peer had no credit left."""
        if self.left <= 0:
            raise ProtocolViolation(f"a window of {payload} bytes came without credit ({self.left} bytes left)")
        return replace(self, left=self.left - payload - WINDOW_COST_BYTES)

    def computed(self, cost: int) -> tuple[ReceiverCredit, int]:
        """Counts windows of that cost as computed; also the bytes to return to the sender now (0: not yet)."""
        owed = self.owed + cost
        if owed < RETURN_AT_BYTES:
            return replace(self, owed=owed), 0
        return ReceiverCredit(self.left + owed, 0), owed


class SlotCredit(Struct, frozen=True):
    """The driver's. ``grants``: what each stage has granted, of ``stages`` in all."""

    stages: int = 1
    grants: Mapping[NodeId, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def granted(self) -> int:
        """The least grant; until all stages have told theirs, no more than ``INITIAL_SLOTS``."""
        least = min(self.grants.values(), default=INITIAL_SLOTS)
        return least if len(self.grants) >= self.stages else min(INITIAL_SLOTS, least)

    def grant(self, node_id: NodeId, slots: int) -> SlotCredit:
        """A stage's grant came; a later one of the same stage takes the place of the first. Raises ProtocolViolation for one
        that lets nothing through."""
        if slots < 1:
            raise ProtocolViolation(f"a grant of {slots} slots lets nothing through")
        return SlotCredit(self.stages, MappingProxyType({**self.grants, node_id: slots}))

    def room(self, tree: TokenTree, covered: int) -> int:
        """Slots that may still be sent. Those on their way through the ring are bounded by the grant, and those that are not
        committed, answered or not: they hold KV at every stage.

        Args:
            tree: the driver's.
            covered: the highest ``next_slot`` that an answer told.
        """
        return max(0, self.granted - max(tree.next_slot - covered, len(tree.alive)))

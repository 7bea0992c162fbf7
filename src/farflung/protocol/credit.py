"""Hop credit: how many bytes of windows may be on their way over one edge (DESIGN.md, rule 8).

Both ends start from the same constant, so the first window needs no round trip. A window costs its payload and a little more.
A sender may send while its credit is positive - one window may overdraw it, so a window larger than the grant still gets
through - and the receiver returns what it has computed, in lumps: a decode row costs no extra frame.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from farflung.core.errors import ProtocolViolation

INITIAL_CREDIT_BYTES = 1024**2
"""Of each edge. Some 100 ms of a 100 Mbps uplink; times the sessions of a node it must stay within a link's queue."""

WINDOW_COST_BYTES = 256
"""Charged for every window beside its payload: a window without rows takes room in queues, too."""

RETURN_AT_BYTES = INITIAL_CREDIT_BYTES // 4


class SenderCredit(Struct, frozen=True):
    """The sending end of an edge."""

    left: int = INITIAL_CREDIT_BYTES

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

    def receive(self, payload: int) -> ReceiverCredit:
        """A window with ``payload`` bytes came. Raises ProtocolViolation where the peer had no credit left."""
        if self.left <= 0:
            raise ProtocolViolation(f"a window of {payload} bytes came without credit ({self.left} bytes left)")
        return replace(self, left=self.left - payload - WINDOW_COST_BYTES)

    def computed(self, payload: int) -> tuple[ReceiverCredit, int]:
        """Counts that window as computed; also the bytes to return to the sender now (0: not yet)."""
        owed = self.owed + payload + WINDOW_COST_BYTES
        if owed < RETURN_AT_BYTES:
            return replace(self, owed=owed), 0
        return ReceiverCredit(self.left + owed, 0), owed

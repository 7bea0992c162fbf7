"""What a stage knows of one session: a value, changed by ``protocol.stage`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from msgspec import Struct, field

from farflung.core.ids import SessionId
from farflung.core.messages import Window
from farflung.core.sampling import TokenLogprob
from farflung.core.tree import TokenTree
from farflung.protocol.credit import ReceiverCredit
from farflung.protocol.events import Payload, WindowReceived
from farflung.protocol.outgoing import OutEdge
from farflung.protocol.windows import is_committed_path, slots_of

ID_BYTES = 4


@dataclass(frozen=True)
class PendingWindow:
    """A window that waits for the compute thread, or is in it.

    Attributes:
        window, payload: without the slots that were dead when it came.
        credit_bytes: what it cost of the predecessor's credit.
        at_s: when it came, on the loop's clock.
    """

    window: Window
    payload: Payload
    credit_bytes: int
    at_s: float = 0.0

    @property
    def is_splittable(self) -> bool:
        """Whether it may be computed in parts: a prompt chunk may, a piece of the token tree not."""
        return is_committed_path(self.window)


class KeptAnswer(NamedTuple):
    """The token after a slot, kept until the commit that covers it."""

    token: int
    logprob: TokenLogprob | None


class StageState(Struct, frozen=True, kw_only=True):
    """One session at one stage.

    Attributes:
        session: its id.
        epoch: of the edge that brings windows.
        row_bytes: size of one incoming row: ``ID_BYTES`` at the first stage.
        needs_ids: a window can be computed once its tokens are known; at the tail, where sampling looks back at the text.
        lease_tokens: the most committed + alive slots.
        context_tokens: positions lie below: what the model was made for.
        max_slots: the most alive slots: this stage's grant.
        out: the edge to the successor; None at the tail.
        tree: what was received, dead slots dropped.
        computed: the tree of the rows that have been computed.
        wanted: slots, the root and alive ones, whose answers are wanted.
        place: of this stage in the route, from 0.
        queue: windows not computed yet, oldest first.
        queue_rows: rows in them.
        early: windows that came before one they build on.
        computing: the first of the queue is in the compute thread.
        ids: tokens of slots that are not computed yet, where they are needed.
        step_ids: of the rows in the compute thread.
        answers: at the tail, of the root and of alive slots.
        owner_attached: the owner's own line is up (rule 4: the tail never dials a client).
    """

    session: SessionId
    epoch: int
    row_bytes: int
    lease_tokens: int
    max_slots: int
    context_tokens: int
    out: OutEdge | None
    needs_ids: bool = False
    owner_attached: bool = False
    tree: TokenTree = field(default_factory=TokenTree)
    computed: TokenTree = field(default_factory=TokenTree)
    wanted: frozenset[int] = frozenset()
    place: int = 0
    queue: tuple[PendingWindow, ...] = ()
    queue_rows: int = 0
    early: tuple[WindowReceived, ...] = ()
    computing: bool = False
    ids: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    step_ids: tuple[int, ...] = ()
    answers: Mapping[int, KeptAnswer] = field(default_factory=lambda: MappingProxyType({}))
    receiver: ReceiverCredit = field(default_factory=ReceiverCredit)

    @property
    def is_tail(self) -> bool:
        return self.out is None

    @property
    def ready(self) -> PendingWindow | None:
        """The window to compute next: none while one is being computed, or while the successor has not taken the last ones'
        rows - what waits here is bounded by what the predecessor may send, not by what it turns into."""
        if self.computing or not self.queue or not (self.out is None or self.out.takes_more):
            return None
        pending = self.queue[0]
        if self.needs_ids and not all(slot in self.ids for slot in slots_of(pending.window) if self.tree.holds(slot)):
            return None
        return pending

"""The sending end of an edge: the driver's to the first stage, each stage's to the next (DESIGN.md, rules 1, 2, 5, 8).

    DOWN --the session begins here--> UP
    DOWN --opening sent again--> ASKING --have--> UP --line lost--> DOWN

While it is up, windows go out in order as the receiver's credit allows. While it is not, nothing is remembered: what the
receiver then lacks is made anew from the tree of what the sender can give. The sender keeps the rows themselves
(``node.row_log``; the driver its token ids): here there are only windows.
"""

from __future__ import annotations

from enum import Enum

from msgspec import Struct, field
from msgspec.structs import replace

from farflung.core.errors import ProtocolViolation
from farflung.core.messages import Have, Window
from farflung.core.tree import TokenTree
from farflung.protocol.credit import INITIAL_CREDIT_BYTES, SenderCredit
from farflung.protocol.limits import MAX_ALIVE_SLOTS
from farflung.protocol.windows import Given, keep_rows, missing


class EdgeStatus(Enum):
    DOWN = 0
    ASKING = 1
    UP = 2


class OutEdge(Struct, frozen=True, kw_only=True):
    """Attributes:
    epoch: of the edge.
    row_bytes: what one row costs of the credit.
    status: see the module.
    credit: what the receiver still takes.
    committed_tokens: committed length that the receiver knows, or will by what was sent.
    held_tokens, held: what the receiver said that it holds: positions below, and slots. Rows of them are not sent.
    waiting: windows that wait for credit.
    backlog_bytes: of windows pushed since the edge went down.
    """

    epoch: int
    row_bytes: int
    status: EdgeStatus = EdgeStatus.DOWN
    credit: SenderCredit = field(default_factory=SenderCredit)
    committed_tokens: int = 0
    held_tokens: int = 0
    held: frozenset[int] = frozenset()
    waiting: tuple[Window, ...] = ()
    backlog_bytes: int = 0

    @property
    def takes_more(self) -> bool:
        """Whether the sender should make more rows: what waits here stays bounded, on a slow link as on a broken one."""
        return not self.waiting and self.backlog_bytes < INITIAL_CREDIT_BYTES


def push(edge: OutEdge, window: Window, tree: TokenTree) -> OutEdge:
    """A window is ready to go; ``tree`` is the one after it. ``flush`` sends it."""
    if edge.status is not EdgeStatus.UP:
        return replace(edge, backlog_bytes=edge.backlog_bytes + window.rows * edge.row_bytes)
    commit = window.commit
    if commit is not None and commit.start != edge.committed_tokens:
        commit = tree.commit_from(edge.committed_tokens, commit.stop)
    held = edge.held
    if held or edge.held_tokens:
        window, _ = keep_rows(window, lambda slot: slot not in held and not _is_below(tree, slot, edge.held_tokens))
        held = frozenset(slot for slot in held if slot > tree.root)
    window = replace(window, epoch=edge.epoch, commit=commit)
    return replace(
        edge,
        committed_tokens=edge.committed_tokens if commit is None else commit.stop,
        held=held,
        held_tokens=edge.held_tokens if tree.committed_tokens <= edge.held_tokens else 0,
        waiting=(*edge.waiting, window),
    )


def _is_below(tree: TokenTree, slot: int, position: int) -> bool:
    """Whether a slot that is alive or committed lies below ``position``."""
    place = tree.alive.get(slot)
    if place is not None:
        return place.position < position
    if tree.committed_tokens <= position:
        return True
    spans = tree.committed_between(position, tree.committed_tokens)
    return slot < spans[0].first


def begin(edge: OutEdge, given: Given) -> OutEdge:
    """The line is up and the session begins at the receiver: it holds nothing, and windows need not wait for it to say so."""
    return _bring(edge, Have(edge.epoch, 0, (), INITIAL_CREDIT_BYTES), given)


def resume(edge: OutEdge, have: Have, given: Given) -> OutEdge:
    """The receiver told what it holds.

    Raises ProtocolViolation where nobody asked, the epoch is another, or numbers are out of range.
    """
    if edge.status is not EdgeStatus.ASKING:
        raise ProtocolViolation("a Have came that nobody asked for")
    if have.epoch != edge.epoch:
        raise ProtocolViolation(f"a Have of epoch {have.epoch} came on an edge of epoch {edge.epoch}")
    if (slots := sum(span.count for span in have.slots)) > MAX_ALIVE_SLOTS:
        raise ProtocolViolation(f"a Have names {slots} slots, at most {MAX_ALIVE_SLOTS} are not committed")
    return _bring(edge, have, given)


def _bring(edge: OutEdge, have: Have, given: Given) -> OutEdge:
    return replace(
        edge,
        status=EdgeStatus.UP,
        credit=SenderCredit.told(have.credit_bytes),
        committed_tokens=max(have.committed_tokens, given.tree.committed_tokens),
        held_tokens=have.committed_tokens,
        held=frozenset(slot for span in have.slots for slot in span),
        waiting=tuple(missing(given, have)) if given.tree.next_slot else (),
        backlog_bytes=0,
    )


def ask(edge: OutEdge) -> OutEdge:
    """The opening went out on a new line, and asks for a ``Have``."""
    return replace(edge, status=EdgeStatus.ASKING, waiting=())


def lost(edge: OutEdge) -> OutEdge:
    """The line is gone."""
    return replace(edge, status=EdgeStatus.DOWN, waiting=())


def refill(edge: OutEdge, size: int) -> OutEdge:
    """The receiver returned credit. Raises ProtocolViolation."""
    return replace(edge, credit=edge.credit.refill(size))


def flush(edge: OutEdge, latest: TokenTree) -> tuple[OutEdge, tuple[Window, ...]]:
    """What goes out now: windows in order, as far as the credit goes, without the rows that died while they waited."""
    if edge.status is not EdgeStatus.UP or not edge.waiting:
        return edge, ()
    sent: list[Window] = []
    credit = edge.credit
    while len(sent) < len(edge.waiting) and credit.may_send:
        window, _ = keep_rows(edge.waiting[len(sent)], latest.holds)
        credit = credit.spend(window.rows * edge.row_bytes)
        sent.append(window)
    return replace(edge, credit=credit, waiting=edge.waiting[len(sent) :]), tuple(sent)

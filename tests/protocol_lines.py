"""Lines between a driver and stages that are values, for tests of the protocol's rules; see ``protocol_world``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from farflung.core.messages import Answer, Credit, Have, Window
from farflung.core.route import Route
from farflung.core.tree import TokenTree
from farflung.protocol.credit import WINDOW_COST_BYTES
from farflung.protocol.stage_state import ID_BYTES
from farflung.protocol.windows import slots_of

STAGES = 3
CORE = 16
VOCABULARY = 97


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one world.

    Attributes:
        lease: tokens.
        grant: slots that may be in flight, and not committed.
        width: a row between stages is so many times 16 bytes.
        tells_ids: the tail looks back at the text, so the driver tells it the tokens.
        overtaking: windows of one edge may overtake each other. No link of ours lets them, and what is counted - leases, slots,
            credit - then lags: so there is room to spare, and rows are small.
    """

    lease: int = 48
    grant: int = 12
    width: int = 1
    tells_ids: bool = False
    overtaking: bool = False

    @property
    def slack(self) -> int:
        return 100 * self.overtaking

    def row_bytes(self, stage: int) -> int:
        """Of a row that comes to the stage."""
        return ID_BYTES if stage == 0 else CORE * self.width

    def cost(self, stage: int) -> int:
        """Credit for a row that comes to the stage."""
        return self.row_bytes(stage)


def id_bytes(token: int) -> bytes:
    return token.to_bytes(ID_BYTES, "little")


def layers(stage: int, seen: Sequence[bytes]) -> bytes:
    """The stand-in for a stage's layers: what one row gives that sees these, itself the last."""
    return blake2b(b"".join(seen), digest_size=CORE, key=bytes([stage])).digest()


def token_of(row: bytes) -> int:
    return int.from_bytes(row, "little") % VOCABULARY


@dataclass(frozen=True)
class Opened:
    """First frame of a line: an ``Open`` without what is checked elsewhere."""

    route: Route
    asks_have: bool


@dataclass(frozen=True)
class Carried:
    """A window as a frame."""

    window: Window
    payload: bytes

    @property
    def cost(self) -> int:
        return len(self.payload) + WINDOW_COST_BYTES


@dataclass(eq=False)
class EdgeLine:
    """One connection of an edge. A silent one swallows everything and nobody is told.

    Attributes:
        there, back: what is on its way.
        held: slots that the receiver said it holds, or that were sent.
        committed: length that the receiver said is committed, or that was told it.
    """

    there: list[Opened | Carried] = field(default_factory=list)
    back: list[Have | Credit] = field(default_factory=list)
    silent: bool = False
    held: set[int] = field(default_factory=set)
    committed: int = 0

    def send(self, frame: Opened | Carried) -> None:
        if isinstance(frame, Carried):
            slots, commit = slots_of(frame.window), frame.window.commit
            assert self.held.isdisjoint(slots), "a row is sent that the receiver holds"
            self.held.update(slots)
            assert commit is None or commit.start == self.committed, "commits on one edge leave gaps or overlap"
            self.committed = self.committed if commit is None else commit.stop
        self.send_again(frame)

    def send_again(self, frame: Opened | Carried) -> None:
        if not self.silent:
            self.there.append(frame)

    def tell(self, have: Have, tree: TokenTree) -> None:
        """The receiver's tree is ``tree``."""
        self.held = {*tree.alive, *(slot for span in tree.committed for slot in span)}
        self.committed = have.committed_tokens
        self.reply(have)

    def reply(self, message: Have | Credit) -> None:
        if not self.silent:
            self.back.append(message)

    def lose(self) -> None:
        """What is on its way, and whatever is sent from now on."""
        self.silent = True
        self.there.clear()
        self.back.clear()


@dataclass(eq=False)
class OwnerLine:
    """Of the tail."""

    there: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """Slots and their tokens."""
    back: list[Answer] = field(default_factory=list)
    silent: bool = False

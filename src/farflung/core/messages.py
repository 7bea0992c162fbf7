"""Every message that travels over a link, on one page. The wire form is msgpack arrays with an integer tag (``wire.frame``).

A *channel* is a number on one link that stands for one edge of one session, both ways; it is the message's address, so no
message repeats the session. ``Open`` or ``Attach`` binds a channel, ``Close`` or ``Fault`` ends it. Channel 0 is the link's.

    driver ----Open+Window---> first stage ----Open+Window---> ... ----Open+Window---> tail
    driver ----Attach--------> every other stage            (the owner's own line to it)
    driver <------------------------------Answer------------------------------------- tail
    driver <------------------------------Fault-------------------------------------- any stage
    each receiver ----Credit----> its predecessor
    driver ----Close---> every stage ----Report----> driver
"""

from __future__ import annotations

from msgspec import Struct

from farflung.core.ids import ModelDigest, NodeId, SessionId
from farflung.core.route import Route
from farflung.core.sampling import SamplingOptions
from farflung.core.window import Commit, SlotRun, SlotSpan

LINK_CHANNEL = 0

MAX_DECODE_ROWS = 64
"""A window with more rows is scheduled as prefill, whatever it wants."""


class Hello(Struct, frozen=True, array_like=True, tag=0):
    """First message each way. ``versions`` is the lowest and highest protocol version spoken."""

    versions: tuple[int, int]
    features: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()


class Ping(Struct, frozen=True, array_like=True, tag=1):
    """Heartbeat and round-trip probe."""

    number: int


class Pong(Struct, frozen=True, array_like=True, tag=2):
    """Answer to the ping of that number; ``received_bytes_per_s`` is the rate at which the pinging side's bulk was seen to
    arrive (0: not measured yet)."""

    number: int
    received_bytes_per_s: float = 0.0


class OpenText(Struct, frozen=True, array_like=True):
    """What the owner signs to open a session.

    Attributes:
        session: its id.
        owner: the driver's key; the signature and the owner's own lines must come from it.
        route: all hops; a receiver must be one of them.
        epoch: generation of the edge this opens.
        lease_tokens: KV asked for, in tokens.
        expires_unix_s: wall-clock time after which the opening is void.
        digest: the model meant.
        codec: how rows are coded between stages.
        sampling: for the tail.
    """

    session: SessionId
    owner: NodeId
    route: Route
    epoch: int
    lease_tokens: int
    expires_unix_s: float
    digest: ModelDigest
    codec: str
    sampling: SamplingOptions


class Open(Struct, frozen=True, array_like=True, tag=3):
    """Opens a session on the receiver: ``text`` is the msgpack of an ``OpenText``, ``signature`` the owner's over it."""

    text: bytes
    signature: bytes


class Attach(Struct, frozen=True, array_like=True, tag=4):
    """The owner's own line to a stage that is opened by its predecessor: answers, faults and closing use it."""

    session: SessionId


class Window(Struct, frozen=True, array_like=True, tag=5):
    """New slots to compute. One buffer: token ids (int32, little endian) for the first stage, coded rows for the others.

    Attributes:
        epoch: of the edge.
        runs: the new slots; rows follow in this order.
        want: slots whose next token is wanted from the tail.
        commit: applied after the new slots are added and before they are computed; it may name them.
    """

    epoch: int
    runs: tuple[SlotRun, ...]
    want: tuple[SlotSpan, ...] = ()
    commit: Commit | None = None

    @property
    def rows(self) -> int:
        return sum(run.count for run in self.runs)

    @property
    def is_decode(self) -> bool:
        """A few rows that all want an answer. A prompt chunk wants none, or that of its last row."""
        return 0 < self.rows <= MAX_DECODE_ROWS and sum(span.count for span in self.want) == self.rows


class Answer(Struct, frozen=True, array_like=True, tag=6):
    """From the tail to the owner: the token after each wanted slot.

    Attributes:
        slots: the wanted slots, in order.
        tokens: one token id per slot.
        committed_tokens: the highest commit applied at the tail, hence at every stage.
        queue_rows: rows waiting at the tail.
        stage_ms: time the tail's last step took.
    """

    slots: tuple[SlotSpan, ...]
    tokens: tuple[int, ...]
    committed_tokens: int
    queue_rows: int = 0
    stage_ms: float = 0.0


class Credit(Struct, frozen=True, array_like=True, tag=7):
    """The receiver of windows lets its predecessor send that many more buffer bytes on this edge."""

    bytes: int


class Fault(Struct, frozen=True, array_like=True, tag=8):
    """The session failed; the channel ends. ``node_id`` is the stage at fault, as far as the reporting one knows; ``code``
    names an error of ``core.errors``."""

    node_id: NodeId
    code: str
    message: str
    hint: str = ""


class Close(Struct, frozen=True, array_like=True, tag=9):
    """The session is over (owner) or this end lets go of the channel. Leases are freed."""

    reason: str = ""


class Report(Struct, frozen=True, array_like=True, tag=10):
    """What a stage did for a session, told to its owner when the owner closes it.

    Attributes:
        node_id: the stage.
        windows, rows: computed in all.
        compute_ms: time of the steps they were computed in (shared steps count whole).
        bytes_out: bytes of frames sent on to the next stage or, by the tail, to the owner.
        decode_windows, decode_compute_ms, decode_bytes_out: the same, of decode windows alone.
    """

    node_id: NodeId
    windows: int = 0
    rows: int = 0
    compute_ms: float = 0.0
    bytes_out: int = 0
    decode_windows: int = 0
    decode_compute_ms: float = 0.0
    decode_bytes_out: int = 0


Message = Hello | Ping | Pong | Open | Attach | Window | Answer | Credit | Fault | Close | Report

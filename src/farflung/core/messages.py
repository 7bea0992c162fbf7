"""Every message that travels over a link, on one page. The wire form is msgpack arrays with an integer tag (``wire.frame``).

A *channel* is a number on one link that stands for one edge of one session, both ways; it is the message's address, so no
message repeats the session. ``Open`` or ``Attach`` binds a channel, ``Close`` or ``Fault`` ends it. Channel 0 is the link's.

    driver ----Open+Window---> first stage ----Open+Window---> ... ----Open+Window---> tail
    driver ----Attach--------> every other stage            (the owner's own line to it)
    driver <---Grant---------- every stage
    driver <------------------------------Answer------------------------------------- tail
    driver <------------------------------Trouble, Evicted, Fault-------------------- any stage
    each receiver ----Have (once, when asked), Credit----> its predecessor
    driver ----Renew, Close---> every stage ----Report----> driver
    driver ----Ids-----------> tail                         (where sampling looks back at the text)
"""

from __future__ import annotations

from msgspec import Struct

from farflung.core.ids import ModelDigest, NodeId, SessionId
from farflung.core.route import Route
from farflung.core.sampling import SamplingOptions, TokenLogprob
from farflung.core.window import Commit, SlotRun, SlotSpan

LINK_CHANNEL = 0

MAX_DECODE_ROWS = 64
"""A window with more rows is scheduled as prefill, whatever it wants."""


class Hello(Struct, frozen=True, array_like=True, tag=0):
    """First message each way.

    Attributes:
        versions: the lowest and highest protocol version spoken.
        features: what is spoken beyond the version (``transport.hello``).
        codecs: names of the activation codecs known.
        proof: of knowing the key of a private swarm (``identity.swarm_key``); empty outside of one.
    """

    versions: tuple[int, int]
    features: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()
    proof: bytes = b""


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
        route: all hops; a receiver must be one of them. Its epochs say which edges are new.
        lease_tokens: KV asked for, in tokens: committed and alive.
        lease_s: the lease ends this long after the owner's last sign of life (a window, a ``Renew``).
        expires_unix_s: wall-clock time after which the text opens no session any more.
        digest: the model meant.
        codecs: those allowed between stages, in order of preference.
        sampling: for the tail.
        prompt_tokens: of the tokens to come, how many are the prompt's (penalties tell them apart).
        max_tokens: how many may be generated; with ``prompt_tokens`` the length that rotary factors are chosen for.
        batch: it can wait: others' interactive sessions go first.
        proof: of knowing the key of a private swarm (``identity.swarm_key``).
    """

    session: SessionId
    owner: NodeId
    route: Route
    lease_tokens: int
    lease_s: float
    expires_unix_s: float
    digest: ModelDigest
    codecs: tuple[str, ...]
    sampling: SamplingOptions
    prompt_tokens: int
    max_tokens: int
    batch: bool = False
    proof: bytes = b""


class Open(Struct, frozen=True, array_like=True, tag=3):
    """First message of an edge: opens the session on the receiver, or takes the edge up again.

    From the predecessor, on a new line: the session begins, or this is the edge's new line after a broken one, or a newer text
    (a higher epoch) makes the sender the new predecessor. From the owner, on its own line: a newer text, with a new successor.

    Attributes:
        text: the msgpack of an ``OpenText``.
        signature: the owner's over it.
        codec: how rows are coded on this edge, one of those allowed; unused where rows are token ids.
        asks_have: the sender does not know what the receiver holds and waits for a ``Have`` before it sends windows.
    """

    text: bytes
    signature: bytes
    codec: str = ""
    asks_have: bool = False


class Attach(Struct, frozen=True, array_like=True, tag=4):
    """The owner's own line to a stage that is opened by its predecessor: answers, faults and closing use it. A later one takes
    the place of a broken one; the tail then repeats the answers it keeps."""

    session: SessionId


class StageTime(Struct, frozen=True, array_like=True):
    """What became of one window at one stage. Durations in ms: there is no common clock.

    Attributes:
        wire_ms: on its way from the stage (or driver) before: half of the link's round trip, as measured.
        queue_ms: from its arrival to the step that took it.
        step_ms: that step, and ``step_rows`` the rows it computed, other sessions' included.
        bytes_per_s: the rate at which the next stage has seen this one's bytes arrive; 0: not measured, or there is none.
    """

    wire_ms: float
    queue_ms: float
    step_ms: float
    step_rows: int
    bytes_per_s: float = 0.0


class Window(Struct, frozen=True, array_like=True, tag=5):
    """New slots to compute. One buffer: token ids (int32, little endian) for the first stage, coded rows for the others.

    Attributes:
        epoch: of the edge.
        runs: the new slots; rows follow in this order.
        want: slots whose next token is wanted from the tail.
        commit: applied after the new slots are added and before they are computed; it may name them.
        next_slot: every slot below it has gone out to the ring with this window or before. Returned by the tail, so that the
            driver knows which slots are in flight no more, the dead included.
        timeline: one entry per stage passed, where the driver asked for it; None where not.
    """

    epoch: int
    runs: tuple[SlotRun, ...]
    want: tuple[SlotSpan, ...] = ()
    commit: Commit | None = None
    next_slot: int = 0
    timeline: tuple[StageTime, ...] | None = None

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
        next_slot: every slot below it has come through the ring, or is dead.
        queue_rows: rows waiting at the tail.
        logprobs: one per token, where the session asked for them.
        timeline: of the window, the tail's entry included, where the driver asked for it.
    """

    slots: tuple[SlotSpan, ...]
    tokens: tuple[int, ...]
    committed_tokens: int
    next_slot: int = 0
    queue_rows: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    timeline: tuple[StageTime, ...] | None = None


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


class Trouble(Struct, frozen=True, array_like=True, tag=11):
    """An edge is down and could not be taken up again: the session waits here for its owner to close it, or to send an opening
    with another route. The fields are those of ``Fault``; ``node_id`` is the stage that is out of reach."""

    node_id: NodeId
    code: str
    message: str
    hint: str = ""


class Have(Struct, frozen=True, array_like=True, tag=12):
    """What the receiver of an edge holds, told once for every ``Open`` that asks.

    Attributes:
        epoch: of the edge.
        committed_tokens: length of the committed prefix; all its rows are held.
        slots: the other held slots.
        credit_bytes: what the sender may send now.
    """

    epoch: int
    committed_tokens: int
    slots: tuple[SlotSpan, ...]
    credit_bytes: int


class Grant(Struct, frozen=True, array_like=True, tag=13):
    """A stage tells the owner, when its line is up, how many slots of the session may be in flight: sent and not covered by an
    answer yet. The least of all stages' counts."""

    slots: int


class Evicted(Struct, frozen=True, array_like=True, tag=14):
    """A stage tells the owner that its log has rows from that position on only: a rebuild of the next stage must begin at an
    earlier stage's log."""

    complete_from: int


class Renew(Struct, frozen=True, array_like=True, tag=15):
    """A sign of life of the owner: the lease goes on for its ``lease_s`` from now."""


class Ids(Struct, frozen=True, array_like=True, tag=16):
    """The owner tells the tail, over its own line, which tokens the slots hold, where a sampling option looks back at the text:
    the stages between never see them. One buffer: the ids (int32, little endian), in the order of the slots."""

    slots: tuple[SlotSpan, ...]


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
        committed_tokens: rows that the digests cover.
        digest_in, digest_out: of the committed rows received and sent (``protocol.digests``): two stages that disagree about
            the edge between them are found. Of the tail there is no ``digest_out``.
    """

    node_id: NodeId
    windows: int = 0
    rows: int = 0
    compute_ms: float = 0.0
    bytes_out: int = 0
    decode_windows: int = 0
    decode_compute_ms: float = 0.0
    decode_bytes_out: int = 0
    committed_tokens: int = 0
    digest_in: bytes = b""
    digest_out: bytes = b""


Message = (
    Hello
    | Ping
    | Pong
    | Open
    | Attach
    | Window
    | Answer
    | Credit
    | Fault
    | Trouble
    | Have
    | Grant
    | Evicted
    | Renew
    | Ids
    | Close
    | Report
)

"""The port every transport implements: a link between two node ids.

A link carries frames both ways on numbered channels. Frames of one channel arrive in the order they were sent; between
channels the more urgent priority goes first, on all links of a node together (they share one uplink). A link that is up is
never waited on for minutes: silence longer than ``LinkConfig.dead_after_s`` ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from farflung.core.errors import FarflungError
from farflung.core.ids import NodeId
from farflung.core.messages import Hello, Message

Buffer = bytes | bytearray | memoryview


class Priority(IntEnum):
    """Lower goes first."""

    CONTROL = 0
    DECODE = 1
    PREFILL = 2
    BULK = 3


@dataclass(frozen=True)
class Frame:
    """A message and the raw buffers that belong to it."""

    message: Message
    buffers: Sequence[Buffer] = field(default=())


@dataclass(frozen=True)
class LinkConfig:
    """Limits and rhythms of a link.

    Attributes:
        handshake_timeout_s: from dialling to the peer's hello.
        heartbeat_s: interval of pings.
        dead_after_s: silence that ends a link; several heartbeats.
        max_frame_bytes: a frame that announces more is refused before anything is allocated.
        stuck_after_s: a peer that takes less than a fragment of what it is sent for so long is ended, though it shows life.
        max_queued_bytes: bytes waiting to be sent on one link before ``send`` raises LinkOverloaded.
        max_queued_bytes_in_all: on all links of a node; over it the link that holds most is ended.
        openings_burst: openings of sessions and owners' lines from one address at once; 0.15 ms each, for the signature.
        openings_per_s: of them, for long. What is more is refused.
        idle_frames_burst: pings, openings that are refused for their number, and frames on channels that nobody holds, from one
            address at once; 0.03 ms each. A session that ends has some hundred on their way.
        idle_frames_per_s: of them, for long. A link that brings more is ended.
        max_partial_frames: channels that may have a frame half received at a time.
        max_partial_bytes: of frames half received on all links of a node; over it the link that holds most is ended.
    """

    handshake_timeout_s: float = 5.0
    heartbeat_s: float = 0.5
    dead_after_s: float = 2.5
    stuck_after_s: float = 20.0
    max_frame_bytes: int = 64 * 1024**2
    max_queued_bytes: int = 256 * 1024**2
    max_queued_bytes_in_all: int = 512 * 1024**2
    openings_burst: int = 1024
    openings_per_s: float = 256.0
    idle_frames_burst: int = 2048
    idle_frames_per_s: float = 256.0
    max_partial_frames: int = 256
    max_partial_bytes: int = 256 * 1024**2


@dataclass
class LinkStats:
    """What a link has measured. Times in seconds, rates in bytes per second; None until measured.

    Bytes are those of the link on the network from its hello on: frames, fragment headers and TLS records (TCP/IP headers and
    the TLS handshake are not among them). The housekeeping part of them is hello, pings and pongs.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    frames_sent: int = 0
    frames_received: int = 0
    round_trip_s: float | None = None
    delivery_bytes_per_s: float | None = None
    housekeeping_bytes_sent: int = 0
    housekeeping_bytes_received: int = 0


class LinkHandler(Protocol):
    """The owner of a link. Called on the event loop; must not block."""

    def on_frame(self, link: Link, channel: int, frame: Frame) -> None:
        """A whole frame arrived. Raising a FarflungError ends the link with that error."""

    def on_lost(self, link: Link, error: FarflungError) -> None:
        """The link is gone, once; nothing more arrives. Also called after a local ``close``."""


class Link(Protocol):
    """One connection to a peer whose key has been checked."""

    @property
    def peer(self) -> NodeId: ...

    @property
    def peer_hello(self) -> Hello | None:
        """What the peer said it speaks (see ``hello``); never None once a link was handed out."""

    @property
    def stats(self) -> LinkStats: ...

    @property
    def is_up(self) -> bool: ...

    def start(self, handler: LinkHandler) -> None:
        """Begins delivery. Frames that arrived before wait until then, within the limits."""

    def new_channel(self) -> int:
        """A channel number unused on this link; the dialling end hands out even ones, the other odd ones."""

    def send(self, channel: int, frame: Frame, priority: Priority) -> int:
        """Queues a frame; never blocks. Buffers must not change afterwards.

        Returns the frame's bytes, fragment headers included. Raises LinkLost where the link is down, LinkOverloaded where its
        queue is full, FrameTooLarge.
        """

    async def close(self, error: FarflungError | None = None) -> None:
        """Flushes what is queued for at most a second, then ends the link. ``error`` is told to the handler."""

    def end(self, error: FarflungError) -> None:
        """Ends the link here and now; what is queued is lost."""

    def idle_frame(self) -> None:
        """The peer sent a frame that was of no use. Raises LinkOverloaded, which ends the link, where it does so too often."""


class Listener(Protocol):
    """Something that accepts links until it is closed."""

    @property
    def address(self) -> str:
        """Where it listens, as ``host:port`` with the real port."""

    async def close(self) -> None: ...


class Transport(Protocol):
    """Dials and accepts links for one node id."""

    @property
    def node_id(self) -> NodeId: ...

    async def dial(self, peer: NodeId, addresses: Sequence[str]) -> Link:
        """A link to ``peer``, on the first address that answers with its key.

        Raises Unreachable (no address answers in time), WrongPeer (another key answers), VersionMismatch,
        NotAdmitted (only one of the two has the swarm's key).
        """

    async def listen(self, address: str, on_link: Callable[[Link], None]) -> Listener:
        """Accepts links at ``host:port`` (port 0: any). Raises AddressInUse, Unreachable (no such interface)."""

    async def close(self) -> None:
        """Ends every link and listener."""

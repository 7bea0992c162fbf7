"""A ``Link`` over any reliable byte stream: greeting, channels, heartbeat, measures, and one clear end.

The stream below (``Wire``) is TLS over tcp, or a path of a memory network; the queue in front of it is the node's
``Uplink``. All of it runs in callbacks of one event loop, without tasks: a link leaves nothing behind that must be awaited.

    GREETING --hello agreed--> UP --close()--> CLOSING --flushed--> LOST
        '--------------------- any failure ----------------------> LOST
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from enum import Enum

from farflung.core.errors import (
    FarflungError,
    FrameTooLarge,
    LinkLost,
    LinkOverloaded,
    ProtocolViolation,
    SessionRefused,
    UsageError,
)
from farflung.core.ids import NodeId, short
from farflung.core.messages import LINK_CHANNEL, Attach, Fault, Hello, Message, Open, Ping, Pong
from farflung.core.units import Bytes
from farflung.transport.byte_stream import FLUSH_S, RECORD_BYTES, Wire
from farflung.transport.link import Frame, LinkHandler, LinkStats, Priority
from farflung.transport.link_setup import LinkSetup
from farflung.transport.measure import DeliveryRate, RoundTrip, fragment_bytes_for
from farflung.transport.uplink import Fragment
from farflung.wire.fragment import MAX_FRAGMENT_BYTES, Reassembler, size_in_fragments
from farflung.wire.frame import decode_frame, encode_frame, frame_size

_LEAST_BEAT_S = 0.02  # timers fire early by up to the clock's resolution (16 ms on Windows) and must not spin until it is time


class _State(Enum):
    GREETING = 0
    UP = 1
    CLOSING = 2
    LOST = 3


class FrameLink:
    """See ``Link`` for the public half.

    Args:
        peer: whose key is at the other end.
        wire: the stream.
        setup: of this node.
        dialled: this end dialled, so it hands out even channels.
        source: the address it comes from (``rates.source_of``).
        greet_by: loop time by which the peer's hello must be here.
        on_greeted: called once: with None when the link is up, with the error when the greeting failed.
    """

    def __init__(
        self,
        peer: NodeId,
        wire: Wire,
        setup: LinkSetup,
        *,
        dialled: bool,
        source: str,
        greet_by: float,
        on_greeted: Callable[[FrameLink, FarflungError | None], None],
    ) -> None:
        self.peer = peer
        self.stats = LinkStats()
        self.peer_hello: Hello | None = None
        self.fragment_bytes = MAX_FRAGMENT_BYTES
        self._loop = asyncio.get_running_loop()
        self._wire = wire
        self._uplink = setup.uplink
        self._source = source
        self._me = setup.me
        self._openings = setup.openings
        self._idle_frames = setup.idle_frames
        self._half_received = setup.half_received
        self._config = config = setup.config
        self._check_hello = setup.check
        self._on_greeted = on_greeted
        self._state = _State.GREETING
        self._next_channel = 2 if dialled else 1
        self._handler: LinkHandler | None = None
        self._held: list[tuple[int, Frame]] | None = []  # frames that came before the handler; None once it is served
        self._held_bytes = 0
        self._error: FarflungError | None = None
        self._drained: asyncio.Future[None] | None = None
        self._reassembler = Reassembler(max_frame_bytes=config.max_frame_bytes, max_partial_frames=config.max_partial_frames)
        self._round_trip = RoundTrip()
        self._delivery = DeliveryRate()
        self._heard = self._loop.time()
        self._stuck_since: float | None = None  # the peer takes nothing
        self._ping_at = self._beat_at = 0.0
        self._timer = self._loop.call_at(greet_by, self._greeting_overdue, self._heard)
        self._post(setup.hello_to(peer))

    def __repr__(self) -> str:
        return f"FrameLink({short(self.peer)}, {self._state.name.lower()})"

    # ---- the port ----

    @property
    def is_up(self) -> bool:
        return self._state is _State.UP

    def start(self, handler: LinkHandler) -> None:
        if self._handler is not None:
            raise UsageError(f"the link to node {short(self.peer)} has a handler already")
        self._handler = handler
        if self._held or self._state is _State.LOST:
            self._loop.call_soon(self._serve_held, handler)
        else:
            self._held = None  # the rest of this very read goes to the handler, which may have enough of it

    def new_channel(self) -> int:
        channel = self._next_channel
        self._next_channel += 2
        return channel

    def send(self, channel: int, frame: Frame, priority: Priority) -> int:
        if self._state is not _State.UP:
            state = "closing" if self._error is None else f"down: {self._error}"
            raise LinkLost(f"the link to node {short(self.peer)} is {state}")
        if channel == LINK_CHANNEL:
            raise UsageError("channel 0 is the link's own", hint="take one from new_channel()")
        parts = encode_frame(frame.message, frame.buffers)
        size = frame_size(parts)
        queued = self._uplink.queued_bytes(self)
        if size > self._config.max_frame_bytes:
            raise FrameTooLarge(
                f"a frame of {Bytes(size)} for node {short(self.peer)} is over the limit of "
                f"{Bytes(self._config.max_frame_bytes)}"
            )
        if queued and queued + size > self._config.max_queued_bytes:
            raise LinkOverloaded(
                f"{Bytes(queued)} wait to be sent to node {short(self.peer)}, another {Bytes(size)} are over the limit of "
                f"{Bytes(self._config.max_queued_bytes)}",
                hint="the peer or the path to it is slower than what is sent; send less at a time",
            )
        self.stats.frames_sent += 1
        self._uplink.send(self, channel, priority, parts, size)
        return size_in_fragments(size, self.fragment_bytes)

    async def close(self, error: FarflungError | None = None) -> None:
        if self._state is not _State.CLOSING:
            by = self._loop.time() + FLUSH_S
            try:
                await self._flush()
            finally:
                self.end(error or LinkLost(f"the link to node {short(self.peer)} was closed by this end"), by)
        await self._wire.ended()

    def end(self, error: FarflungError, by: float | None = None) -> None:
        """Ends the link at once; what is queued is lost.

        Args:
            error: for the handler.
            by: loop time by which what was written must have arrived.
        """
        if self._state is _State.LOST:
            return
        greeting = self._state is _State.GREETING
        self._state = _State.LOST
        self._error = error
        self._timer.cancel()
        self._uplink.drop(self)
        self._reassembler.clear()
        self._half_received.report(self, 0)
        self.drained()
        self._wire.finish(self._loop.time() + FLUSH_S if by is None else by)
        if greeting:
            self._on_greeted(self, error)
        elif self._held is None:
            self._loop.call_soon(self._tell_lost)

    def idle_frame(self) -> None:
        if not self._idle_frames.take(self._source, self._heard):
            raise LinkOverloaded(f"{self._source} sends more than {self._idle_frames.per_s:g} frames of no use a second")

    # ---- called by the wire ----

    def on_bytes(self, chunks: Sequence[bytes], wire_bytes: int) -> None:
        """Bytes arrived, in one read: plaintext, and how many they were on the network."""
        self._heard = self._loop.time()
        self.stats.bytes_received += wire_bytes
        if self._state not in (_State.GREETING, _State.UP):
            return
        size = 0
        try:
            for chunk in chunks:
                size += len(chunk)
                for channel, _, data in self._reassembler.feed(chunk):
                    message, buffers = decode_frame(data)
                    if channel == LINK_CHANNEL:
                        self._take_own(message, len(data))
                    else:
                        self._take(channel, Frame(message, buffers), len(data))
                    if self._state not in (_State.GREETING, _State.UP):
                        return
        except FarflungError as error:
            self.end(error)
            return
        self._delivery.arrived(self._heard, size, mid_frame=self._reassembler.partial_frames > 0)
        self._half_received.report(self, self._reassembler.partial_bytes)

    def on_writable(self) -> None:
        """The wire has room again."""
        self._stuck_since = None
        self._uplink.writable(self)

    def on_wire_lost(self, error: FarflungError) -> None:
        """The wire ended by itself."""
        self.end(error)

    # ---- called by the uplink ----

    @property
    def writable(self) -> bool:
        return self._wire.writable

    def transmit(self, fragment: Fragment) -> None:
        # Joined, because each piece by itself would become a TLS record with 22 bytes around it.
        self.stats.bytes_sent += self._wire.write(b"".join(fragment))

    def drained(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # ---- inside ----

    async def _flush(self) -> None:
        if self._state is _State.UP:
            self._state = _State.CLOSING
            self._timer.cancel()
            if self._held is not None:
                self._held = []
            if self._uplink.queued_bytes(self):
                self._drained = self._loop.create_future()
                await asyncio.wait([self._drained], timeout=FLUSH_S)

    def _take(self, channel: int, frame: Frame, size: int) -> None:
        if self._state is _State.GREETING:
            raise ProtocolViolation(f"node {short(self.peer)} sent a frame on channel {channel} before its hello")
        self.stats.frames_received += 1
        if isinstance(frame.message, Open | Attach) and not self._openings.take(self._source, self._heard):
            # This one alone: others' sessions share the link.
            error = SessionRefused(
                f"{self._source} opens sessions faster than {self._openings.per_s:g} a second", hint="try again in a moment"
            )
            self.send(channel, Frame(Fault(self._me, error.code, error.message, error.hint)), Priority.CONTROL)
            self.idle_frame()
            return
        if self._held is None:
            if self._handler is not None:
                self._handler.on_frame(self, channel, frame)
            return
        self._held.append((channel, frame))
        self._held_bytes += size
        if self._held_bytes > self._config.max_frame_bytes:
            raise LinkOverloaded(
                f"node {short(self.peer)} sent {Bytes(self._held_bytes)} before anybody here listened, "
                f"at most {Bytes(self._config.max_frame_bytes)} are kept"
            )

    def _take_own(self, message: Message, size: int) -> None:
        self.stats.housekeeping_bytes_received += size_in_fragments(size) + RECORD_BYTES
        match message:
            case Hello() if self.peer_hello is None:
                self.peer_hello = message
                self._check_hello(message, self.peer)
                self._state = _State.UP
                self._timer.cancel()
                self._beat()
                self._on_greeted(self, None)
            case Ping() if self.peer_hello is not None:
                self.idle_frame()
                if self.writable:  # as for pings; and a peer that asks without reading makes nothing pile up here
                    self._post(Pong(message.number, self._delivery.bytes_per_s))
            case Pong() if self.peer_hello is not None:
                self._round_trip.pong(message.number, self._heard)
                self.stats.round_trip_s = self._round_trip.seconds
                if 0 < message.received_bytes_per_s < math.inf:
                    self.stats.delivery_bytes_per_s = message.received_bytes_per_s
                    self._cut_for(message.received_bytes_per_s)
            case _:
                raise ProtocolViolation(
                    f"node {short(self.peer)} sent a {type(message).__name__} on the link's own channel, out of place"
                )

    def _post(self, message: Message) -> None:
        parts = encode_frame(message)
        size = frame_size(parts)
        self.stats.housekeeping_bytes_sent += size_in_fragments(size) + RECORD_BYTES
        self._uplink.send(self, LINK_CHANNEL, Priority.CONTROL, parts, size)

    def _cut_for(self, bytes_per_s: float) -> None:
        fragment_bytes = fragment_bytes_for(bytes_per_s)
        if fragment_bytes != self.fragment_bytes:
            self.fragment_bytes = fragment_bytes
            self._wire.bound_unsent(2 * fragment_bytes)

    def _beat(self) -> None:
        """Sends the ping that is due, ends the link if the peer is silent, and sets the timer for the next of both."""
        now = self._loop.time()
        late_s, silent_s = now - self._beat_at, now - self._heard
        if silent_s >= self._config.dead_after_s and late_s > self._config.heartbeat_s:
            # It was this end that slept; what came meanwhile is read before a timer that is set now.
            self._beat_after(now)
            return
        if silent_s >= self._config.dead_after_s:
            self.end(
                LinkLost(
                    f"node {short(self.peer)} has been silent for {silent_s:.1f} s",
                    hint="it has stopped, or the network between is gone; look at its log and at `farflung status`",
                )
            )
            return
        if not self.writable and self._stuck_since is None:
            self._stuck_since = now
        if self._stuck_since is not None and now - self._stuck_since >= self._config.stuck_after_s:
            self.end(
                LinkLost(
                    f"node {short(self.peer)} has taken nothing of what it was sent for {now - self._stuck_since:.1f} s",
                    hint="it is overloaded, or does not read on purpose",
                )
            )
            return
        if now >= self._ping_at:
            self._ping_at = now + self._config.heartbeat_s
            if self.writable:  # else enough is under way to show life, and pings would only pile up
                self._post(Ping(self._round_trip.ping(now)))
        self._beat_after(max(min(self._ping_at, self._heard + self._config.dead_after_s), now + _LEAST_BEAT_S))

    def _beat_after(self, when: float) -> None:
        self._beat_at = when
        self._timer = self._loop.call_at(when, self._beat)

    def _greeting_overdue(self, since: float) -> None:
        self.end(
            LinkLost(
                f"node {short(self.peer)} proved its key but said no hello within {self._loop.time() - since:.1f} s",
                hint="is it overloaded, or another program with a node's key?",
            )
        )

    def _serve_held(self, handler: LinkHandler) -> None:
        """Hands over what came before the handler, then lets the rest through."""
        held, self._held = self._held or [], None
        try:
            for channel, frame in held:
                handler.on_frame(self, channel, frame)
        except FarflungError as error:
            self.end(error)
        if self._state is _State.LOST:
            self._loop.call_soon(self._tell_lost)

    def _tell_lost(self) -> None:
        handler, self._handler = self._handler, None
        if handler is not None and self._error is not None:
            handler.on_lost(self, self._error)

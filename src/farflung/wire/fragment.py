"""Fragments: how the frames of many channels share one byte stream, so that a small urgent frame waits for 16 KiB at most.

Layout of a fragment, little endian:

    offset   size   what
    0        2      p, length of the payload in bytes
    2        1      flags: bit 0 first of its frame, bit 1 last, bits 2-3 priority, bits 4-7 zero
    3        1      zero
    4        4      channel
    8        p      payload; in a first fragment it begins with the frame's length (4 bytes)

A fragment has at most 16 KiB, header included: the largest plaintext of a TLS record (RFC 8446, 5.1). Fragments of different
channels mix freely; the frames of one channel follow one another.

The receiving side holds partial frames. What they may cost is bounded thrice: by the size a frame announces, by how many are
partial at a time, and by their bytes in all. A buffer grows with what has arrived (a ``bytearray`` keeps at most an eighth in
reserve) instead of being made at the announced size, so that announcing costs the receiver nothing; growing is as fast as
filling a buffer made in advance, because a large ``realloc`` moves pages rather than bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from farflung.core.errors import FrameTooLarge, MalformedFrame, ProtocolViolation, UsageError
from farflung.wire.frame import Buffer, frame_size

MAX_FRAGMENT_BYTES = 16 * 1024
MIN_FRAGMENT_BYTES = 64
MAX_CHANNEL = 2**32 - 1
MAX_FRAME_BYTES = 2**32 - 1

_HEADER = struct.Struct("<HBBI")
_HEADER_AND_TOTAL = struct.Struct("<HBBII")
_TOTAL = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size
_TOTAL_BYTES = _TOTAL.size
_FIRST, _LAST, _PRIORITY_SHIFT, _UNUSED_FLAGS = 1, 2, 2, 0xF0
_MOST_PINNED = 4  # times its own size that a frame may keep in memory
_MAX_PAYLOAD = MAX_FRAGMENT_BYTES - _HEADER_BYTES


def fragments(
    channel: int, priority: int, parts: Sequence[Buffer], fragment_bytes: int = MAX_FRAGMENT_BYTES
) -> Iterator[list[Buffer]]:
    """Cuts one frame into fragments, each made when it is asked for.

    Args:
        channel: unsigned, 32 bits.
        priority: 0 to 3, carried along.
        parts: of the frame, as ``encode_frame`` returns them; they are sliced, not copied.
        fragment_bytes: most bytes of a fragment, header included.

    Yields:
        The buffers of one fragment in order, its header first.

    Raises:
        FrameTooLarge: the frame's length does not fit 32 bits.
        UsageError: an argument out of range, or no bytes at all.
    """
    total = frame_size(parts)
    if not (0 <= channel <= MAX_CHANNEL and 0 <= priority <= 3 and MIN_FRAGMENT_BYTES <= fragment_bytes <= MAX_FRAGMENT_BYTES):
        raise UsageError(
            f"channel {channel}, priority {priority} or fragments of {fragment_bytes} bytes out of range",
            hint=f"priorities are 0 to 3, fragments have {MIN_FRAGMENT_BYTES} to {MAX_FRAGMENT_BYTES} bytes",
        )
    if not 0 < total <= MAX_FRAME_BYTES:
        if not total:
            raise UsageError("a frame without bytes cannot be sent")
        raise FrameTooLarge(f"a frame of {total} bytes cannot be sent: at most {MAX_FRAME_BYTES}")
    flags = priority << _PRIORITY_SHIFT
    if _HEADER_BYTES + _TOTAL_BYTES + total <= fragment_bytes:
        return iter([[_HEADER_AND_TOTAL.pack(_TOTAL_BYTES + total, flags | _FIRST | _LAST, 0, channel, total), *parts]])
    return _split(channel, flags, parts, total, fragment_bytes)


def size_in_fragments(size: int, fragment_bytes: int = MAX_FRAGMENT_BYTES) -> int:
    """Bytes of all ``fragments`` of a frame of ``size`` bytes together, their headers included."""
    payload = _TOTAL_BYTES + size
    return payload + _HEADER_BYTES * -(-payload // (fragment_bytes - _HEADER_BYTES))


def _split(channel: int, flags: int, parts: Sequence[Buffer], total: int, fragment_bytes: int) -> Iterator[list[Buffer]]:
    room = fragment_bytes - _HEADER_BYTES - _TOTAL_BYTES
    pieces: list[Buffer] = [_HEADER_AND_TOTAL.pack(_TOTAL_BYTES + room, flags | _FIRST, 0, channel, total)]
    left = total
    for part in parts:
        view = memoryview(part)
        at = 0
        while at < len(view):
            taken = min(room, len(view) - at)
            pieces.append(view[at : at + taken])
            at += taken
            room -= taken
            left -= taken
            if room == 0 and left:
                yield pieces
                room = min(fragment_bytes - _HEADER_BYTES, left)
                pieces = [_HEADER.pack(room, flags | (_LAST if room == left else 0), 0, channel)]
    yield pieces


class _Partial:
    __slots__ = ("data", "priority", "total")

    def __init__(self, total: int, priority: int, data: Buffer) -> None:
        self.total = total
        self.priority = priority
        self.data = bytearray(data)


class Reassembler:
    """Puts frames together from a stream of fragments, however the stream is cut.

    After an error the stream has lost its sense: end the link, ``clear``.

    Args:
        max_frame_bytes: a frame that announces more is refused.
        max_partial_frames: frames that may be partial at a time.
        max_partial_bytes: bytes of all partial frames together; four times ``max_frame_bytes`` where None.
    """

    def __init__(self, max_frame_bytes: int, max_partial_frames: int, max_partial_bytes: int | None = None) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._max_partial_frames = max_partial_frames
        self._max_partial_bytes = 4 * max_frame_bytes if max_partial_bytes is None else max_partial_bytes
        self._partials: dict[int, _Partial] = {}
        self._partial_bytes = 0
        self._rest = bytearray()  # of a fragment that is not here yet as a whole

    @property
    def partial_frames(self) -> int:
        return len(self._partials)

    @property
    def partial_bytes(self) -> int:
        """Bytes held of frames that are not whole yet."""
        return self._partial_bytes + len(self._rest)

    def clear(self) -> None:
        """Forgets all that is partial. For a link that has ended: nothing may be fed any more."""
        self._partials.clear()
        self._partial_bytes = 0
        self._rest = bytearray()

    def feed(self, data: Buffer) -> list[tuple[int, int, memoryview]]:
        """Takes the next bytes of the stream, any number of them.

        A frame in one fragment is a view into ``data`` where that is read-only, which promises that its bytes never change, and
        not much larger than the frame, because the view keeps all of it in memory. It is copied out of a large buffer, and out
        of a writable one, which its owner may fill again after this call.

        Returns:
            (channel, priority, frame) for every frame these bytes complete, in order.

        Raises:
            FrameTooLarge: a frame announces more than the limit; nothing was allocated for it.
            MalformedFrame: bytes that are no fragment.
            ProtocolViolation: fragments that do not follow one another, or more partial frames than allowed.
        """
        view = memoryview(data)
        size = len(view)
        done: list[tuple[int, int, memoryview]] = []
        at = self._feed_rest(view, done) if self._rest else 0
        while size - at >= _HEADER_BYTES:
            length, flags, zero, channel = _HEADER.unpack_from(view, at)
            if zero or flags & _UNUSED_FLAGS or not 0 < length <= _MAX_PAYLOAD:
                raise _no_fragment(length, flags, zero, channel)
            end = at + _HEADER_BYTES + length
            if end > size:
                break
            self._take(channel, flags, view[at + _HEADER_BYTES : end], size, done)
            at = end
        if at < size:
            self._rest += view[at:]
        return done

    def _feed_rest(self, view: memoryview, done: list[tuple[int, int, memoryview]]) -> int:
        """Completes the fragment that was cut by the end of the last bytes; returns how many of ``view`` that took."""
        rest = self._rest
        at = 0
        if len(rest) < _HEADER_BYTES:
            at = _HEADER_BYTES - len(rest)
            rest += view[:at]
            if len(rest) < _HEADER_BYTES:
                return len(view)
        length: int
        length, flags, zero, channel = _HEADER.unpack_from(rest)
        if zero or flags & _UNUSED_FLAGS or not 0 < length <= _MAX_PAYLOAD:
            raise _no_fragment(length, flags, zero, channel)
        end = at + _HEADER_BYTES + length - len(rest)
        rest += view[at:end]
        if len(rest) < _HEADER_BYTES + length:
            return len(view)
        self._rest = bytearray()
        self._take(channel, flags, memoryview(rest).toreadonly()[_HEADER_BYTES:], len(rest), done)
        return end

    def _take(self, channel: int, flags: int, payload: memoryview, whole: int, done: list[tuple[int, int, memoryview]]) -> None:
        """One whole fragment whose header has been checked; its payload is a view of a buffer of ``whole`` bytes."""
        priority = flags >> _PRIORITY_SHIFT
        if not flags & _FIRST:
            self._continue(channel, priority, bool(flags & _LAST), payload, done)
            return
        if len(payload) <= _TOTAL_BYTES:
            raise MalformedFrame(f"the first fragment of a frame on channel {channel} carries nothing")
        (total,) = _TOTAL.unpack_from(payload)
        if total > self._max_frame_bytes:
            raise FrameTooLarge(
                f"a frame of {total} bytes is announced on channel {channel}, at most {self._max_frame_bytes} may be"
            )
        if channel in self._partials:
            raise ProtocolViolation(f"a frame begins on channel {channel} before the one there has ended")
        body = payload[_TOTAL_BYTES:]
        if flags & _LAST:
            if len(body) != total:
                raise ProtocolViolation(f"a frame on channel {channel} ends after {len(body)} bytes of {total}")
            may_stay = body.readonly and total * _MOST_PINNED >= whole - _HEADER_BYTES - _TOTAL_BYTES
            done.append((channel, priority, body if may_stay else memoryview(bytes(body))))
            return
        if len(body) >= total:
            raise ProtocolViolation(f"a frame on channel {channel} has {len(body)} bytes of {total} and no end")
        if len(self._partials) >= self._max_partial_frames:
            raise ProtocolViolation(f"more than {self._max_partial_frames} frames are partial at a time")
        self._hold(len(body))
        self._partials[channel] = _Partial(total, priority, body)

    def _continue(
        self, channel: int, priority: int, last: bool, payload: memoryview, done: list[tuple[int, int, memoryview]]
    ) -> None:
        partial = self._partials.get(channel)
        if partial is None:
            raise ProtocolViolation(f"a frame goes on on channel {channel} that never began")
        if priority != partial.priority:
            raise ProtocolViolation(f"a frame on channel {channel} changes from priority {partial.priority} to {priority}")
        have = len(partial.data) + len(payload)
        if last is not (have == partial.total) or have > partial.total:
            raise ProtocolViolation(
                f"a frame on channel {channel} has {have} bytes of {partial.total}, {'an' if last else 'no'} end"
            )
        self._hold(len(payload))
        partial.data += payload
        if last:
            del self._partials[channel]
            self._partial_bytes -= have
            done.append((channel, priority, memoryview(partial.data).toreadonly()))

    def _hold(self, size: int) -> None:
        if self._partial_bytes + size > self._max_partial_bytes:
            raise ProtocolViolation(
                f"{len(self._partials)} partial frames hold {self._partial_bytes} bytes, at most {self._max_partial_bytes} may"
            )
        self._partial_bytes += size


def _no_fragment(length: int, flags: int, zero: int, channel: int) -> MalformedFrame:
    return MalformedFrame(
        f"no fragment begins so: payload of {length} bytes (1 to {_MAX_PAYLOAD} are allowed), "
        f"flags {flags:#04x}, reserved {zero:#04x}, channel {channel}"
    )

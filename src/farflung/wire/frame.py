"""One frame: a message of ``core.messages`` and the raw buffers that belong to it, as bytes.

Layout, little endian:

    offset          size      what
    0               1         protocol version
    1               1         n, number of buffers, at most 16
    2               2         h, length of the header in bytes
    4               4 n       length of each buffer in bytes
    4 + 4 n         h         header: msgpack array, its first item the message's tag
    4 + 4 n + h     ...       the buffers, one after the other, nothing after the last

Buffers are neither copied nor looked into, here or there. Whatever bytes arrive, decoding ends in a message or in a
FarflungError, and allocates in proportion to the bytes that are there, never to a number they announce.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from farflung.core.errors import FarflungError, FrameTooLarge, MalformedFrame, ProtocolViolation, VersionMismatch
from farflung.core.messages import Message

Buffer = bytes | bytearray | memoryview

PROTOCOL_VERSION = 1
MAX_HEADER_BYTES = 2**16 - 1
MAX_BUFFERS = 16
MAX_BUFFER_BYTES = 2**32 - 1

_PREFIX = tuple(struct.Struct(f"<BBH{count}I") for count in range(MAX_BUFFERS + 1))
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode_frame(message: Message, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """The parts of one frame in order: prefix and header as one ``bytes``, then the buffers, not copied.

    Every part's ``len`` is its size in bytes. Raises FrameTooLarge over a limit of this module, MalformedFrame where a buffer
    is not contiguous.
    """
    header = _ENCODER.encode(message)
    if len(header) > MAX_HEADER_BYTES or len(buffers) > MAX_BUFFERS:
        raise FrameTooLarge(
            f"a {type(message).__name__} with a header of {len(header)} bytes and {len(buffers)} buffers does not fit a frame: "
            f"at most {MAX_HEADER_BYTES} bytes and {MAX_BUFFERS} buffers"
        )
    parts: list[Buffer] = [b""]
    parts.extend(_flat(buffer) if isinstance(buffer, memoryview) else buffer for buffer in buffers)
    sizes = [len(part) for part in parts[1:]]
    if sizes and max(sizes) > MAX_BUFFER_BYTES:
        raise FrameTooLarge(f"a buffer of {max(sizes)} bytes does not fit a frame: at most {MAX_BUFFER_BYTES} bytes")
    parts[0] = _PREFIX[len(sizes)].pack(PROTOCOL_VERSION, len(sizes), len(header), *sizes) + header
    return parts


def frame_size(parts: Sequence[Buffer]) -> int:
    """Bytes of the frame that ``encode_frame`` returned."""
    return sum(map(len, parts))


def decode_frame(data: Buffer) -> tuple[Message, tuple[memoryview, ...]]:
    """The message in exactly one frame, and its buffers as views into ``data``.

    Raises VersionMismatch (another protocol version), ProtocolViolation (slots or the like out of range), MalformedFrame
    (everything else that is wrong).
    """
    size = len(data)
    if size < 4:
        raise MalformedFrame(f"a frame of {size} bytes is too short: its prefix has at least 4")
    if data[0] != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"a frame of protocol version {data[0]} arrived, this node speaks version {PROTOCOL_VERSION}",
            hint="let both ends run the same version of farflung",
        )
    count = data[1]
    if count > MAX_BUFFERS:
        raise MalformedFrame(f"a frame announces {count} buffers, at most {MAX_BUFFERS} are allowed")
    prefix = _PREFIX[count]
    if size < prefix.size:
        raise MalformedFrame(f"a frame of {size} bytes is too short for the lengths of {count} buffers")
    _, _, header_bytes, *sizes = prefix.unpack_from(data)
    at = prefix.size + header_bytes
    if size != at + sum(sizes):
        raise MalformedFrame(f"a frame of {size} bytes announces {at + sum(sizes)}: header {header_bytes}, buffers {sizes}")
    view = memoryview(data)
    message = _decode_header(view[prefix.size : at])
    buffers = []
    for length in sizes:
        buffers.append(view[at : at + length])
        at += length
    return message, tuple(buffers)


def _decode_header(header: memoryview) -> Message:
    try:
        return _DECODER.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"a frame's header of {len(header)} bytes cannot be decoded: {error}") from error
    except (MalformedFrame, ProtocolViolation):
        raise
    except FarflungError as error:  # a noun refused its values; on the wire that is the peer's fault, not a usage error
        raise ProtocolViolation(f"a frame's header holds a value that cannot be: {error}") from error


def _flat(view: memoryview[Any]) -> memoryview:
    """The same bytes as a view whose length is their number."""
    if view.itemsize == 1 and view.ndim == 1 and view.c_contiguous:
        return view
    if not view.c_contiguous:
        raise MalformedFrame(f"a buffer of shape {view.shape} and strides {view.strides} is not contiguous")
    return view.cast("B")

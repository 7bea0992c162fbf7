"""What arrives on a link: the first byte chooses the layer, the rest is what a stranger sent to it.

0  a stream of fragments, cut as the second byte says; what it completes is decoded as frames
1  one frame
2  the header of a frame, its lengths right: more of the msgpack decoder in less luck
3  an opening
4  coded rows: the second byte chooses the codec, the third the width
"""

from __future__ import annotations

from contextlib import suppress

import msgspec
import numpy as np

from farflung.core.errors import CodecError, FarflungError
from farflung.core.messages import Message
from farflung.protocol.opening import decode_open_text, encode_open_text
from farflung.wire.codec import CODEC_NAMES, codec
from farflung.wire.fragment import Reassembler
from farflung.wire.frame import PROTOCOL_VERSION, decode_frame, encode_frame
from fuzz.targets.promises import promise

STREAM, FRAME, HEADER, OPENING, ROWS = range(5)

_MAX_FRAME_BYTES = 64 * 1024
_MAX_PARTIAL_FRAMES = 4


def frames(data: bytes) -> None:
    """Raises PromiseBroken, or whatever the code should not have raised."""
    if len(data) < 3:
        return
    layer, rest = data[0] % 5, data[1:]
    with suppress(FarflungError):
        if layer == STREAM:
            _stream(rest[1:], 1 + rest[0])
        elif layer == FRAME:
            _frame(rest)
        elif layer == HEADER:
            _frame(frame_around(rest[: 2**16 - 1]))
        elif layer == OPENING:
            _opening(rest)
        else:
            _rows(CODEC_NAMES[rest[0] % len(CODEC_NAMES)], 1 + rest[1], rest[2:])


def frame_around(header: bytes) -> bytes:
    """A frame without buffers that has this header."""
    return bytes((PROTOCOL_VERSION, 0)) + len(header).to_bytes(2, "little") + header


def _stream(stream: bytes, piece_bytes: int) -> None:
    whole, end = _fed(stream, len(stream) or 1)
    cut, cut_end = _fed(stream, piece_bytes)
    # In one piece an error takes the frames before it along; apart from that the cuts must not show.
    promise(type(end) is type(cut_end), f"in one piece: {end!r}, in pieces of {piece_bytes}: {cut_end!r}")
    promise(end is not None or whole == cut, f"pieces of {piece_bytes} gave other frames")
    for received in cut:
        with suppress(FarflungError):
            _frame(received)


def _fed(stream: bytes, piece_bytes: int) -> tuple[list[bytes], FarflungError | None]:
    receiver = Reassembler(max_frame_bytes=_MAX_FRAME_BYTES, max_partial_frames=_MAX_PARTIAL_FRAMES)
    received: list[bytes] = []
    try:
        for start in range(0, len(stream), piece_bytes):
            received += [bytes(frame) for _, _, frame in receiver.feed(stream[start : start + piece_bytes])]
            held, most = receiver.partial_bytes, start + piece_bytes
            promise(held <= most, f"{held} bytes held after {most} were fed")
            promise(receiver.partial_frames <= _MAX_PARTIAL_FRAMES, f"{receiver.partial_frames} partial frames held")
    except FarflungError as error:
        return received, error
    return received, None


def _frame(data: bytes) -> None:
    message, buffers = decode_frame(data)
    promise(sum(map(len, buffers)) <= len(data), "buffers are larger than the frame")
    coded = _joined(message, buffers)
    again, _ = decode_frame(coded)
    promise(_joined(again, buffers) == coded, f"{message!r} does not survive coding")


def _joined(message: Message, buffers: tuple[memoryview, ...]) -> bytes:
    return b"".join(encode_frame(message, buffers))


def _opening(data: bytes) -> None:
    text = decode_open_text(data)
    coded = encode_open_text(text)
    promise(encode_open_text(msgspec.msgpack.decode(coded, type=type(text))) == coded, f"{text!r} does not survive coding")


def _rows(name: str, width: int, data: bytes) -> None:
    used = codec(name)
    data = data[: len(data) // used.row_bytes(width) * used.row_bytes(width)]
    rows = used.decode(data, width)
    promise(rows.shape == (len(data) // used.row_bytes(width), width), f"{name} gave rows of shape {rows.shape}")
    promise(bool(np.isfinite(rows).all()), f"{name} gave a value that is not finite")
    with suppress(CodecError):  # a decoder may read a little more than encoders write
        promise(len(used.encode(rows)) == len(data), f"{name} rows have another size when coded again")

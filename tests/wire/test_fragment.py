"""Fragments: frames of many channels over one byte stream, however it is cut, within bounds whatever arrives."""

from __future__ import annotations

import itertools
import random
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.core.errors import FarflungError, FrameTooLarge, MalformedFrame, ProtocolViolation, UsageError
from farflung.wire.fragment import MAX_FRAGMENT_BYTES, MIN_FRAGMENT_BYTES, Reassembler, fragments, size_in_fragments

FIRST, LAST = 1, 2
MIB = 2**20


def reassembler() -> Reassembler:
    return Reassembler(max_frame_bytes=MIB, max_partial_frames=8)


def fragment(flags: int, payload: bytes, channel: int = 4, zero: int = 0) -> bytes:
    return struct.pack("<HBBI", len(payload), flags, zero, channel) + payload


def first(total: int, body: bytes, flags: int = FIRST, channel: int = 4) -> bytes:
    return fragment(flags, struct.pack("<I", total) + body, channel)


def collect(receiver: Reassembler, *pieces: bytes) -> list[tuple[int, int, bytes]]:
    return [(channel, priority, bytes(data)) for piece in pieces for channel, priority, data in receiver.feed(piece)]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(edges)]


parts = st.lists(st.binary(max_size=400), min_size=1, max_size=4).filter(any)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3), parts), max_size=8),
    st.integers(MIN_FRAGMENT_BYTES, 300),
    st.randoms(use_true_random=False),
    st.lists(st.integers(0, 10_000), max_size=20),
)
def test_frames_of_mixed_channels_come_back_however_the_stream_is_cut(
    frames: list[tuple[int, int, list[bytes]]], fragment_bytes: int, order: random.Random, places: list[int]
) -> None:
    queues: dict[int, list[bytes]] = {}
    for channel, priority, sent in frames:
        pieces = [b"".join(piece) for piece in fragments(channel, priority, sent, fragment_bytes)]
        assert all(len(piece) <= fragment_bytes for piece in pieces)
        queues.setdefault(channel, []).extend(pieces)
    stream = b""
    while queues:
        channel = order.choice(sorted(queues))
        stream += queues[channel].pop(0)
        if not queues[channel]:
            del queues[channel]

    whole = collect(reassembler(), stream)
    for channel in range(8):
        assert [(priority, data) for on, priority, data in whole if on == channel] == [
            (priority, b"".join(sent)) for on, priority, sent in frames if on == channel
        ]
    receiver = reassembler()
    assert collect(receiver, *cut(stream, places)) == whole
    assert (receiver.partial_frames, receiver.partial_bytes) == (0, 0)
    assert collect(reassembler(), *(stream[at : at + 1] for at in range(len(stream)))) == whole


@pytest.mark.parametrize("size", [1, 2, 16_371, 16_372, 16_373, 16_374, 32_752, 32_753, 300_001])
def test_frames_around_the_size_of_a_fragment_come_back(size: int) -> None:
    sent = random.Random(size).randbytes(size)
    pieces = [b"".join(piece) for piece in fragments(9, 2, [sent[:1], sent[1:]])]
    assert max(map(len, pieces)) <= MAX_FRAGMENT_BYTES
    assert collect(reassembler(), *pieces) == [(9, 2, sent)]


@given(st.integers(1, 40_000), st.integers(MIN_FRAGMENT_BYTES, MAX_FRAGMENT_BYTES))
def test_the_size_in_fragments_is_that_of_the_fragments(size: int, fragment_bytes: int) -> None:
    sent = sum(len(buffer) for pieces in fragments(9, 2, [bytes(size)], fragment_bytes) for buffer in pieces)
    assert size_in_fragments(size, fragment_bytes) == sent


def test_a_small_frame_costs_twelve_bytes_and_no_copy() -> None:
    body = bytes(1000)
    (pieces,) = fragments(9, 2, [body])
    assert pieces[1] is body
    assert len(pieces[0]) == 12
    stream = b"".join(pieces)
    ((_, _, data),) = reassembler().feed(stream)
    assert data.obj is stream


def test_a_small_frame_does_not_keep_a_large_chunk_in_memory() -> None:
    large, small = fragments(9, 2, [bytes(5000)]), [next(fragments(9, 2, [bytes(50)])) for _ in range(20)]
    stream = b"".join(itertools.chain(*large, *small))
    frames = [data for _, _, data in reassembler().feed(stream)]
    assert frames[0].obj is stream
    assert [len(data) for data in frames[1:]] == [50] * 20
    assert all(data.obj is not stream for data in frames[1:])


def test_a_large_frame_is_sliced_when_asked_for_and_not_copied() -> None:
    body = bytes(MIB)
    stream = fragments(9, 2, [body])
    for _ in range(3):
        assert all(piece.obj is body for piece in next(stream) if isinstance(piece, memoryview))


def test_a_receive_buffer_may_be_filled_again_after_feeding() -> None:
    buffer = bytearray(b"".join(next(fragments(9, 2, [b"kept"]))))
    ((_, _, data),) = reassembler().feed(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert data == b"kept"
    buffer.append(0)  # and resized: no view into it is left


def test_arguments_out_of_range_are_refused_by_the_sender() -> None:
    for channel, priority, sent, size in (
        (2**32, 1, b"x", 100),
        (-1, 1, b"x", 100),
        (1, 4, b"x", 100),
        (1, 1, b"x", MIN_FRAGMENT_BYTES - 1),
        (1, 1, b"x", MAX_FRAGMENT_BYTES + 1),
        (1, 1, b"", 100),
    ):
        with pytest.raises(UsageError):
            fragments(channel, priority, [sent], size)


def test_a_frame_of_4_gb_is_refused_before_anything_is_allocated() -> None:
    receiver = Reassembler(max_frame_bytes=64 * MIB, max_partial_frames=256)
    announced = first(2**32 - 1, b"x" * 100)
    tracemalloc.start()
    try:
        with pytest.raises(FrameTooLarge, match="4294967295"):
            receiver.feed(announced)
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()


def test_frames_announced_and_never_sent_cost_what_has_arrived() -> None:
    receiver = Reassembler(max_frame_bytes=64 * MIB, max_partial_frames=256)
    tracemalloc.start()
    try:
        for channel in range(256):
            receiver.feed(first(64 * MIB, b"x" * 10, channel=channel))
        assert tracemalloc.get_traced_memory()[1] < 256 * 1000
    finally:
        tracemalloc.stop()
    assert (receiver.partial_frames, receiver.partial_bytes) == (256, 2560)


def test_one_partial_frame_more_than_allowed_breaks_the_protocol() -> None:
    receiver = reassembler()
    for channel in range(8):
        receiver.feed(first(100, b"x", channel=channel))
    with pytest.raises(ProtocolViolation, match="more than 8"):
        receiver.feed(first(100, b"x", channel=8))


def test_partial_frames_together_stay_within_their_bytes() -> None:
    receiver = Reassembler(max_frame_bytes=MIB, max_partial_frames=8, max_partial_bytes=250)
    receiver.feed(first(1000, bytes(100), channel=1))
    receiver.feed(first(1000, bytes(100), channel=2))
    with pytest.raises(ProtocolViolation, match="at most 250"):
        receiver.feed(fragment(0, bytes(51), channel=1))


def test_a_frame_that_ends_makes_room_for_another() -> None:
    receiver = Reassembler(max_frame_bytes=MIB, max_partial_frames=1, max_partial_bytes=100)
    for _ in range(3):
        assert collect(receiver, first(80, bytes(60)), fragment(LAST, bytes(20))) == [(4, 0, bytes(80))]


VIOLATIONS: dict[str, tuple[list[bytes], type[FarflungError]]] = {
    "continuation without a first": ([fragment(0, b"x")], ProtocolViolation),
    "last without a first": ([fragment(LAST, b"x")], ProtocolViolation),
    "first inside a frame": ([first(100, b"x"), first(100, b"x")], ProtocolViolation),
    "whole frame inside a frame": ([first(100, b"x"), first(1, b"x", FIRST | LAST)], ProtocolViolation),
    "more than announced": ([first(4, b"xx"), fragment(0, b"xxx")], ProtocolViolation),
    "more than announced, last": ([first(4, b"xx"), fragment(LAST, b"xxx")], ProtocolViolation),
    "all of it and no end": ([first(4, b"xx"), fragment(0, b"xx")], ProtocolViolation),
    "first with all of it and no end": ([first(2, b"xx")], ProtocolViolation),
    "first with more than announced": ([first(2, b"xxx")], ProtocolViolation),
    "end before all of it": ([first(4, b"xx"), fragment(LAST, b"x")], ProtocolViolation),
    "one fragment, less than announced": ([first(4, b"xx", FIRST | LAST)], ProtocolViolation),
    "one fragment, more than announced": ([first(1, b"xx", FIRST | LAST)], ProtocolViolation),
    "another priority": ([first(4, b"xx"), fragment(LAST | 1 << 2, b"xx")], ProtocolViolation),
    "empty continuation": ([first(4, b"xx"), fragment(0, b"")], MalformedFrame),
    "empty last": ([first(4, b"xx"), fragment(LAST, b"")], MalformedFrame),
    "first without a total": ([fragment(FIRST, b"xxx")], MalformedFrame),
    "first that carries nothing": ([first(4, b"")], MalformedFrame),
    "frame of no bytes": ([first(0, b"", FIRST | LAST)], MalformedFrame),
    "reserved byte": ([fragment(0, b"x", zero=1)], MalformedFrame),
    "unused flags": ([fragment(0x10, b"x")], MalformedFrame),
    "fragment over 16 KiB": ([fragment(FIRST, bytes(MAX_FRAGMENT_BYTES - 7))], MalformedFrame),
    "frame over the limit": ([first(MIB + 1, b"x")], FrameTooLarge),
}


@pytest.mark.parametrize(("pieces", "error"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
def test_every_violation_has_its_error_however_the_stream_is_cut(pieces: list[bytes], error: type[FarflungError]) -> None:
    with pytest.raises(error):
        collect(reassembler(), b"".join(pieces))
    with pytest.raises(error):
        collect(reassembler(), *(bytes([byte]) for byte in b"".join(pieces)))


def test_a_header_that_is_wrong_is_refused_before_its_payload_arrives() -> None:
    for header in (fragment(FIRST, bytes(20_000))[:8], fragment(0, b"x", zero=1)[:8]):
        with pytest.raises(MalformedFrame):
            reassembler().feed(header)
        with pytest.raises(MalformedFrame):
            collect(reassembler(), header[:3], header[3:])


@settings(deadline=None)
@given(st.lists(st.binary(max_size=100), max_size=20))
def test_random_bytes_end_in_a_typed_error_and_stay_within_bounds(pieces: list[bytes]) -> None:
    receiver = reassembler()
    try:
        for piece in pieces:
            receiver.feed(piece)
    except FarflungError:
        pass
    assert receiver.partial_bytes <= sum(map(len, pieces))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3), st.integers(0, 40), st.integers(0, 60)), max_size=30))
def test_fragments_in_any_order_end_in_frames_or_a_typed_error(
    plan: list[tuple[int, int, int, int]],
) -> None:
    receiver = reassembler()
    fed = 0
    try:
        for flags, channel, total, size in plan:
            body = bytes(size)
            data = first(total, body, flags, channel) if flags & FIRST else fragment(flags, body, channel)
            fed += len(data)
            receiver.feed(data)
    except FarflungError:
        pass
    assert receiver.partial_bytes <= fed
    assert receiver.partial_frames <= 8

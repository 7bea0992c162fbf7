"""Frames: message and buffers there and back, and nothing but typed errors for everything else."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farflung.core.errors import FarflungError, FrameTooLarge, MalformedFrame, ProtocolViolation, VersionMismatch
from farflung.core.ids import NodeId, SessionId
from farflung.core.messages import (
    Answer,
    Attach,
    Close,
    Credit,
    Evicted,
    Fault,
    Grant,
    Have,
    Hello,
    Ids,
    Message,
    Open,
    Ping,
    Pong,
    Renew,
    Report,
    StageTime,
    Trouble,
    Window,
)
from farflung.core.sampling import TokenLogprob
from farflung.core.window import Commit, SlotRun, SlotSpan
from farflung.wire.fragment import fragments
from farflung.wire.frame import MAX_BUFFERS, PROTOCOL_VERSION, Buffer, decode_frame, encode_frame, frame_size
from fuzz.seeds import MESSAGES

small = st.integers(0, 2**20)
spans = st.builds(SlotSpan, small, st.integers(1, 300))
runs = st.tuples(small, st.integers(1, 300), small).map(lambda run: SlotRun(run[0] + run[2] + 1, run[1], run[2]))
rates = st.floats(0, 1e12)
timelines = st.none() | st.lists(st.builds(StageTime, rates, rates, rates, small, rates), max_size=3).map(tuple)
logprobs = st.builds(TokenLogprob, st.floats(-1e3, 0), st.lists(st.tuples(small, st.floats(-1e3, 0)), max_size=3).map(tuple))
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Hello,
        st.tuples(small, small),
        st.lists(st.text(), max_size=3).map(tuple),
        st.lists(st.text()).map(tuple),
        st.binary(max_size=64),
    ),
    st.builds(Ping, st.integers(0, 2**63)),
    st.builds(Pong, st.integers(0, 2**63), rates),
    st.builds(Open, st.binary(), st.binary(max_size=64), st.text(), st.booleans()),
    st.builds(Attach, st.text("0123456789abcdef", min_size=32, max_size=32).map(SessionId)),
    st.builds(
        Window,
        small,
        st.lists(runs, max_size=4).map(tuple),
        st.lists(spans, max_size=4).map(tuple),
        st.none() | st.builds(Commit, small, st.lists(spans, max_size=4).map(tuple)),
        small,
        timelines,
    ),
    st.builds(
        Answer,
        st.lists(spans).map(tuple),
        st.lists(small).map(tuple),
        small,
        small,
        small,
        st.lists(logprobs, max_size=3).map(tuple),
        timelines,
    ),
    st.builds(Credit, st.integers(0, 2**40)),
    st.builds(Fault, st.text(max_size=64).map(NodeId), st.text(), st.text(), st.text()),
    st.builds(Trouble, st.text(max_size=64).map(NodeId), st.text(), st.text(), st.text()),
    st.builds(Have, small, small, st.lists(spans, max_size=4).map(tuple), small),
    st.builds(Grant, small),
    st.builds(Evicted, small),
    st.builds(Renew),
    st.builds(Ids, st.lists(spans, max_size=4).map(tuple)),
    st.builds(Close, st.text()),
    st.builds(Report, st.text(max_size=64).map(NodeId), small, small, rates, small, small, rates, small),
)
buffers = st.lists(st.binary(max_size=300), max_size=MAX_BUFFERS)


def frame(message: Message, buffers: Sequence[Buffer] = ()) -> bytes:
    return b"".join(encode_frame(message, buffers))


def test_the_examples_cover_every_message() -> None:
    assert {type(message) for message in MESSAGES} == set(get_args(Message))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_with_its_buffers(message: Message) -> None:
    assert decode_frame(frame(message)) == (message, ())
    decoded, received = decode_frame(frame(message, [b"one", bytearray(b""), memoryview(b"three")]))
    assert decoded == message
    assert [bytes(buffer) for buffer in received] == [b"one", b"", b"three"]


@settings(deadline=None)
@given(messages, buffers)
def test_a_frame_comes_back_as_it_was(message: Message, sent: list[bytes]) -> None:
    parts = encode_frame(message, sent)
    data = b"".join(parts)
    assert frame_size(parts) == len(data)
    decoded, received = decode_frame(data)
    assert decoded == message
    assert list(map(bytes, received)) == sent


def test_buffers_are_neither_copied_on_the_way_out_nor_on_the_way_in() -> None:
    rows = bytes(10_000)
    assert encode_frame(Ping(1), [rows])[1] is rows
    data = frame(Ping(1), [rows])
    _, (received,) = decode_frame(data)
    assert received.obj is data


def test_a_buffer_of_wider_items_travels_as_its_bytes() -> None:
    ids = memoryview(struct.pack("<3i", 1, 2, 3)).cast("i")
    _, (received,) = decode_frame(frame(Ping(1), [ids]))
    assert received.tobytes() == ids.tobytes()


def test_a_buffer_with_gaps_is_refused() -> None:
    with pytest.raises(MalformedFrame, match="not contiguous"):
        encode_frame(Ping(1), [memoryview(bytes(100))[::2]])


def test_what_does_not_fit_a_frame_is_refused_by_the_sender() -> None:
    with pytest.raises(FrameTooLarge, match="17 buffers"):
        encode_frame(Ping(1), [b""] * 17)
    with pytest.raises(FrameTooLarge, match="header of 7"):
        encode_frame(Open(bytes(70_000), b""))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_end_in_a_typed_error(data: bytes) -> None:
    with suppress(FarflungError):
        decode_frame(data)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_a_random_header_ends_in_a_message_or_a_typed_error(header: bytes) -> None:
    with suppress(MalformedFrame, ProtocolViolation):
        decode_frame(struct.pack("<BBH", PROTOCOL_VERSION, 0, len(header)) + header)


@settings(deadline=None)
@given(messages, buffers, st.data())
def test_a_frame_with_a_byte_changed_ends_in_a_message_or_a_typed_error(
    message: Message, sent: list[bytes], data: st.DataObject
) -> None:
    damaged = bytearray(frame(message, sent))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with suppress(FarflungError):
        decode_frame(damaged)


@settings(deadline=None)
@given(messages, buffers, st.data())
def test_a_frame_cut_short_or_with_a_tail_is_malformed(message: Message, sent: list[bytes], data: st.DataObject) -> None:
    whole = frame(message, sent)
    with pytest.raises(MalformedFrame):
        decode_frame(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(MalformedFrame):
        decode_frame(whole + b"\0")


def with_header(header: bytes) -> bytes:
    return struct.pack("<BBH", PROTOCOL_VERSION, 0, len(header)) + header


HUGE_NUMBERS_IN_HEADERS = {
    "runs": bytes.fromhex("930500dd40000000"),
    "slots": bytes.fromhex("9406dd40000000"),
    "message": bytes.fromhex("dd800000000101"),
    "unknown extra field": bytes.fromhex("930100dd40000000"),
    "bytes": bytes.fromhex("9303c6800000000101"),
    "text": bytes.fromhex("9209db800000000101"),
}


@pytest.mark.parametrize("header", HUGE_NUMBERS_IN_HEADERS.values(), ids=HUGE_NUMBERS_IN_HEADERS.keys())
def test_a_size_announced_inside_a_header_allocates_nothing(header: bytes) -> None:
    assert peak_bytes_of_refusing(with_header(header)) < 20_000


def test_a_buffer_announced_with_4_gb_allocates_nothing() -> None:
    header = msgspec.msgpack.encode(Ping(1))
    data = struct.pack("<BBHI", PROTOCOL_VERSION, 1, len(header), 2**32 - 1) + header
    assert peak_bytes_of_refusing(data) < 20_000


def peak_bytes_of_refusing(data: bytes) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(MalformedFrame):
            decode_frame(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("nest", [b"\x91", b"\x81\x01"], ids=["arrays", "maps"])
def test_a_deeply_nested_header_is_malformed(nest: bytes) -> None:
    with pytest.raises(MalformedFrame):
        decode_frame(with_header(bytes.fromhex("930100") + nest * (60_000 // len(nest))))


def test_text_that_is_not_utf8_is_malformed() -> None:
    with pytest.raises(MalformedFrame):
        decode_frame(with_header(b"\x92\x09\xa1\xff"))


def test_an_unknown_message_is_malformed() -> None:
    with pytest.raises(MalformedFrame):
        decode_frame(with_header(msgspec.msgpack.encode([99])))


def test_slots_out_of_range_break_the_protocol() -> None:
    for run in ([5, 2**40, 1], [5, 1, 5], [-1, 1, -2], [5, 0, 1]):
        with pytest.raises(ProtocolViolation):
            decode_frame(with_header(msgspec.msgpack.encode([5, 0, [run]])))


def test_another_version_is_named() -> None:
    data = bytearray(frame(Ping(1)))
    data[0] = 9
    with pytest.raises(VersionMismatch, match=r"version 9 .* version 1"):
        decode_frame(data)


def test_fields_that_a_newer_peer_appends_are_ignored() -> None:
    assert decode_frame(with_header(msgspec.msgpack.encode([1, 7, "new"]))) == (Ping(7), ())


def on_the_wire(message: Message, sent: Sequence[Buffer] = ()) -> int:
    return sum(len(piece) for piece in next(fragments(6, 1, encode_frame(message, sent))))


def test_a_decode_window_and_its_answer_take_at_most_60_bytes_on_the_wire() -> None:
    slot = 8000
    window = Window(2, (SlotRun(slot, 1, slot - 1),), (SlotSpan(slot, 1),), Commit(slot - 1, (SlotSpan(slot - 1, 1),)))
    token_id = struct.pack("<i", 151_643)
    answer = Answer((SlotSpan(slot, 1),), (151_643,), slot, slot + 1, 3)
    assert on_the_wire(window, [token_id]) <= 60
    assert on_the_wire(answer) <= 60

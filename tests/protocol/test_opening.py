"""What a stage checks before it believes an opening, and what a later one for the same session may change."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import DigestMismatch, FarflungError, MalformedFrame, ProtocolViolation, SessionRefused
from farflung.core.ids import ModelDigest, NodeId, SessionId
from farflung.core.messages import OpenText
from farflung.core.model import LayerRange, ModelSpec
from farflung.core.route import Hop, Route
from farflung.core.sampling import SamplingOptions
from farflung.protocol.opening import (
    CLOCK_SKEW_S,
    MAX_OPEN_BYTES,
    OPENING_VALID_S,
    check_expiry,
    check_newer,
    check_open,
    decode_open_text,
    encode_open_text,
)

A, B, C, OWNER = (NodeId(digit * 64) for digit in "abcd")
SPEC = ModelSpec(
    name="m", family="llama", digest=ModelDigest("0" * 64), layers=4, hidden_size=8, vocab_size=100, context_tokens=32
)
ROUTE = Route((Hop(A, LayerRange(0, 2)), Hop(B, LayerRange(2, 4))))
REPAIRED = Route((Hop(A, LayerRange(0, 2)), Hop(C, LayerRange(2, 4), epoch=2)))
NOW_UNIX_S = 1_700_000_000.0
TEXT = OpenText(
    session=SessionId("1" * 32),
    owner=OWNER,
    route=ROUTE,
    lease_tokens=20,
    lease_s=60.0,
    expires_unix_s=NOW_UNIX_S + OPENING_VALID_S,
    digest=SPEC.digest,
    codecs=("int8", "fp32"),
    sampling=SamplingOptions(temperature=0.5),
    prompt_tokens=10,
    max_tokens=10,
)


def text(**changes: object) -> OpenText:
    return msgspec.structs.replace(TEXT, **changes)


def place(opened: OpenText, codec: str = "int8", me: NodeId = B, layers: LayerRange = LayerRange(2, 4)) -> int:  # noqa: B008
    return check_open(opened, codec, me=me, spec=SPEC, layers=layers, codecs=frozenset({"fp32", "int8"}))


def test_an_opening_reads_as_it_was_written() -> None:
    assert decode_open_text(encode_open_text(TEXT)) == TEXT


@given(st.binary(max_size=200) | st.integers(0, 300).map(lambda cut: encode_open_text(TEXT)[:cut]))
def test_what_is_no_opening_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedFrame):
        decode_open_text(data)


def test_an_opening_has_a_largest_size() -> None:
    with pytest.raises(MalformedFrame, match="over the limit"):
        decode_open_text(bytes(MAX_OPEN_BYTES + 1))


def test_a_stage_learns_its_place_in_the_route() -> None:
    assert place(TEXT) == 1
    assert place(TEXT, "", me=A, layers=LayerRange(0, 2)) == 0, "the codec is of no use where rows are token ids"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"digest": ModelDigest("1" * 64)}, DigestMismatch),
        ({"route": Route((Hop(B, LayerRange(0, 2)),))}, ProtocolViolation),
        ({"route": Route((Hop(A, LayerRange(0, 2)), Hop(C, LayerRange(2, 4))))}, ProtocolViolation),
        ({"route": Route((Hop(A, LayerRange(0, 3)), Hop(B, LayerRange(3, 4))))}, ProtocolViolation),
        ({"codecs": ("zip",)}, SessionRefused),
        ({"codecs": ("fp32",)}, ProtocolViolation),
        ({"lease_s": 0.5}, SessionRefused),
        ({"lease_s": 1e9}, SessionRefused),
        ({"lease_s": float("nan")}, SessionRefused),
        ({"prompt_tokens": 0}, SessionRefused),
        ({"max_tokens": 0}, SessionRefused),
        ({"lease_tokens": 19}, SessionRefused),
        ({"lease_tokens": SPEC.context_tokens + 1025}, SessionRefused),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_opening_that_does_not_fit_this_stage_is_refused(changes: dict[str, object], error: type[FarflungError]) -> None:
    with pytest.raises(error):
        place(text(**changes))


def test_an_allowed_codec_that_this_stage_does_not_speak_is_refused() -> None:
    with pytest.raises(SessionRefused, match="does not speak codec"):
        place(text(codecs=("int4", "fp32")), "int4")


@pytest.mark.parametrize("off_s", [-1.0, OPENING_VALID_S + CLOCK_SKEW_S + 1.0, float("nan"), float("inf")])
def test_an_opening_of_yesterday_or_for_next_year_begins_nothing(off_s: float) -> None:
    check_expiry(TEXT, NOW_UNIX_S)
    with pytest.raises(SessionRefused):
        check_expiry(text(expires_unix_s=NOW_UNIX_S + off_s), NOW_UNIX_S)


def test_a_later_opening_may_change_the_route_under_a_higher_epoch() -> None:
    check_newer(TEXT, TEXT)
    check_newer(text(route=REPAIRED, expires_unix_s=NOW_UNIX_S + 999, proof=b"again"), TEXT)
    check_newer(TEXT, text(route=REPAIRED))


@pytest.mark.parametrize(
    "changes",
    [
        {"owner": A},
        {"lease_tokens": 21},
        {"sampling": SamplingOptions()},
        {"codecs": ("fp32",)},
        {"max_tokens": 9},
        {"batch": True},
        {"route": Route((Hop(A, LayerRange(0, 2)), Hop(C, LayerRange(2, 4))))},
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_later_opening_may_change_nothing_else(changes: dict[str, object]) -> None:
    with pytest.raises(ProtocolViolation):
        check_newer(text(**changes), TEXT)

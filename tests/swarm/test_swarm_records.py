from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarm_samples import NOW, OTHER_DIGEST, a_record, signed, signed_as_is, withdrawal

from farflung.core.errors import BadSignature, RecordRefused, UsageError
from farflung.core.model import LayerRange
from farflung.identity.keys import Identity
from farflung.swarm.addresses import can_be_dialled, split_address
from farflung.swarm.links import LinkReport, LinkTo, open_links, sign_links
from farflung.swarm.records import Query, SignedRecord, open_record, open_withdrawal, sign_record

ALICE, BOB = Identity.generate(), Identity.generate()


def fields_of(identity: Identity, **changes: Any) -> dict[str, Any]:
    fields = msgspec.to_builtins(a_record(identity))
    assert isinstance(fields, dict)
    return {**fields, **changes}


def test_a_record_signed_by_its_node_is_read_back_as_it_was() -> None:
    assert open_record(signed(ALICE), NOW) == a_record(ALICE)


def test_a_record_with_a_changed_byte_is_refused() -> None:
    good = signed(ALICE)
    forged = SignedRecord(good.text.replace(b"192.0.2.7", b"192.0.2.8"), good.signature)
    with pytest.raises(BadSignature):
        open_record(forged, NOW)


def test_a_record_signed_by_another_key_is_refused() -> None:
    with pytest.raises(BadSignature):
        open_record(signed_as_is(BOB, fields_of(ALICE)), NOW)
    with pytest.raises(RecordRefused, match="cannot sign a record for node"):
        sign_record(BOB, a_record(ALICE))


def test_a_signature_for_one_purpose_is_none_for_another() -> None:
    leaving = withdrawal(ALICE, 5)
    assert open_withdrawal(leaving, NOW).sequence == 5
    with pytest.raises(RecordRefused):
        open_record(leaving, NOW)  # it lacks the fields of a record
    with pytest.raises(BadSignature):
        open_record(signed_as_is(ALICE, fields_of(ALICE), context="withdrawal/1"), NOW)
    with pytest.raises(BadSignature):
        open_withdrawal(signed(ALICE), NOW)  # a record has all fields of a withdrawal


@pytest.mark.parametrize(
    ("now", "message"),
    [(NOW + 181, "issued 181 s ago"), (NOW + 86_400, "issued 86400 s ago"), (NOW - 121, "121 s in the future")],
)
def test_a_record_of_another_time_is_refused_with_a_hint_at_the_clocks(now: float, message: str) -> None:
    with pytest.raises(RecordRefused, match=message) as caught:
        open_record(signed(ALICE), now)
    assert "clocks" in caught.value.hint
    assert open_record(signed(ALICE), NOW + 180).sequence == open_record(signed(ALICE), NOW - 120).sequence == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence": -1},
        {"sequence": 2**63},
        {"ttl_s": 0.5},
        {"ttl_s": 601},
        {"ttl_s": None},  # what JSON makes of NaN
        {"addresses": []},
        {"addresses": ["h:1"] * 9},
        {"addresses": ["0.0.0.0:7400"]},
        {"addresses": ["[::]:7400"]},
        {"addresses": ["192.0.2.7:0"]},
        {"addresses": ["192.0.2.7:70000"]},
        {"addresses": ["999.0.0.1:80"]},
        {"addresses": ["http://evil/:80"]},
        {"addresses": ["a b:80"]},
        {"addresses": ["::1:80"]},
        {"addresses": ["x" * 300 + ":80"]},
        {"model": ""},
        {"model": "x" * 257},
        {"model": "red\x1b[31m"},
        {"family": "../../etc"},
        {"digest": "ab"},
        {"digest": "AB" * 32},
        {"model_layers": 0},
        {"model_layers": 5},
        {"model_layers": 10**9},
        {"layers": [6, 6]},
        {"layers": [-1, 6]},
        {"hidden_size": 0},
        {"hidden_size": 2**40},
        {"t_curve_ms": [[1, 1.0]] * 65},
        {"t_curve_ms": [[0, 1.0]]},
        {"t_curve_ms": [[1, -1.0]]},
        {"t_curve_ms": [[4, 1.0], [2, 1.0]]},
        {"t_curve_ms": "10"},
        {"kv_free_tokens": 1001},
        {"kv_free_tokens": -1},
        {"kv_tokens": 2**50},
        {"codecs": ["int8"] * 17},
        {"codecs": ["in t8"]},
        {"engine_class": "x" * 65},
        {"uplink_bytes_per_s": -1.0},
        {"status": "lying"},
        {"version": "x" * 300},
        {"node_id": "zz"},
        {"node_id": 7},
    ],
)
def test_a_record_that_makes_no_sense_is_refused_even_under_the_right_key(changes: dict[str, Any]) -> None:
    with pytest.raises(RecordRefused):
        open_record(signed_as_is(ALICE, fields_of(ALICE, **changes)), NOW)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"node_id":1e999}', b"[" * 16_000, b" " * 16_385],
)
def test_junk_is_refused_before_its_signature_is_looked_at(text: bytes) -> None:
    with pytest.raises(RecordRefused):
        open_record(SignedRecord(text, b"\0" * 64), NOW)


def test_a_signature_of_another_length_is_refused() -> None:
    with pytest.raises(RecordRefused, match="a signature of 3 bytes"):
        open_record(SignedRecord(signed(ALICE).text, b"abc"), NOW)


def test_fields_of_a_newer_version_are_passed_over() -> None:
    assert open_record(signed_as_is(ALICE, fields_of(ALICE, colour="red")), NOW) == a_record(ALICE)


@given(st.binary(max_size=300))
def test_no_text_breaks_the_reader(text: bytes) -> None:
    with pytest.raises((RecordRefused, BadSignature)):
        open_record(SignedRecord(text, b"\0" * 64), NOW)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.7:7400", ("192.0.2.7", 7400)),
        ("[2001:db8::7]:1", ("2001:db8::7", 1)),
        ("node-7.example.org:65535", ("node-7.example.org", 65535)),
        ("localhost:0", ("localhost", 0)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
        ("localhost", None),
        ("[localhost]:1", None),
        ("1.2.3:80", None),
        (":80", None),
        ("a..b:80", None),
        ("a:-1", None),
    ],
)
def test_addresses_are_host_and_port(text: str, expected: tuple[str, int] | None) -> None:
    if expected is None:
        with pytest.raises(UsageError, match=r"is no address|names no host"):
            split_address(text)
        assert not can_be_dialled(text)
    else:
        assert split_address(text) == expected
        assert can_be_dialled(text) == (expected[1] > 0 and "%" not in text)


@pytest.mark.parametrize(
    ("query", "layers", "matches"),
    [
        (Query(), "0:6", True),
        (Query(model="test/tiny"), "0:6", True),
        (Query(model="ab" * 32), "0:6", True),
        (Query(model="test/other"), "0:6", False),
        (Query(beside=LayerRange(6, 12)), "0:6", True),
        (Query(beside=LayerRange(6, 12)), "12:18", True),
        (Query(beside=LayerRange(6, 12)), "6:12", False),
        (Query(beside=LayerRange(6, 12)), "13:18", False),
        (Query(beside=LayerRange(6, 12)), "4:9", True),
        (Query(beside=LayerRange(0, 6)), "12:18", False),
    ],
)
def test_a_query_finds_records_by_model_and_by_adjacent_layers(query: Query, layers: str, matches: bool) -> None:
    assert query.matches(a_record(ALICE, layers=layers)) is matches
    assert not Query(model=OTHER_DIGEST).matches(a_record(ALICE, layers=layers))


@pytest.mark.parametrize(
    "links",
    [
        (LinkTo(ALICE.node_id, 0.1),),
        (LinkTo(BOB.node_id, 0.1), LinkTo(BOB.node_id, 0.2)),
        (LinkTo(BOB.node_id, -0.1),),
        (LinkTo(BOB.node_id, float("nan")),),
        (LinkTo(BOB.node_id, 0.1, float("inf")),),
        (LinkTo("x", 0.1),),
    ],
)
def test_a_link_report_that_makes_no_sense_is_refused(links: tuple[LinkTo, ...]) -> None:
    report = LinkReport(node_id=ALICE.node_id, sequence=1, issued_unix_s=NOW, ttl_s=60.0, links=links)
    with pytest.raises(RecordRefused):
        sign_links(ALICE, report)
    with pytest.raises(RecordRefused):
        open_links(signed_as_is(ALICE, msgspec.to_builtins(report), context="links/1"), NOW)

"""Whose sessions a node takes, and how much of it one driver may have: tables of cases."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import ConfigError, NotAdmitted, SessionRefused, UsageError
from farflung.core.ids import ModelDigest, NodeId, SessionId
from farflung.core.messages import OpenText
from farflung.core.model import LayerRange
from farflung.core.route import Hop, Route
from farflung.core.sampling import SamplingOptions
from farflung.identity.allow_list import AllowList
from farflung.identity.swarm_key import SwarmKey
from farflung.node.admission import Admission, check_exposure, is_loopback
from farflung.node.quotas import STRANGERS_KV_SHARE, Asked, Quotas, Usage, check_session, check_waiting

KEY, OTHER = SwarmKey(bytes(range(32))), SwarmKey(bytes(32))
ALICE, BOB = NodeId("a" * 64), NodeId("b" * 64)
SESSION = SessionId("1" * 32)
EXPIRES = 1_700_000_300.0
ONLY_ALICE = AllowList(frozenset({ALICE}))


def opening(owner: NodeId, key: SwarmKey | None) -> OpenText:
    return OpenText(
        session=SESSION,
        owner=owner,
        route=Route((Hop(NodeId("c" * 64), LayerRange(0, 2)),)),
        lease_tokens=16,
        lease_s=60.0,
        expires_unix_s=EXPIRES,
        digest=ModelDigest("d" * 64),
        codecs=("fp32",),
        sampling=SamplingOptions(),
        prompt_tokens=2,
        max_tokens=4,
        proof=b"" if key is None else key.open_proof(owner, SESSION, EXPIRES),
    )


@pytest.mark.parametrize(
    ("admission", "owner", "key", "says"),
    [
        (Admission(), BOB, None, None),
        (Admission(), BOB, KEY, None),
        (Admission(swarm_key=KEY), BOB, KEY, None),
        (Admission(swarm_key=KEY), BOB, None, "shows no swarm key"),
        (Admission(swarm_key=KEY), BOB, OTHER, "another swarm key"),
        (Admission(drivers=ONLY_ALICE), ALICE, None, None),
        (Admission(drivers=ONLY_ALICE), BOB, None, "not on this node's list"),
        (Admission(drivers=AllowList(frozenset())), ALICE, None, "list of 0"),
        (Admission(swarm_key=KEY, drivers=ONLY_ALICE), ALICE, KEY, None),
        (Admission(swarm_key=KEY, drivers=ONLY_ALICE), ALICE, None, "shows no swarm key"),
        (Admission(swarm_key=KEY, drivers=ONLY_ALICE), BOB, KEY, "not on this node's list"),
    ],
)
def test_an_opening_must_meet_all_that_the_node_asks_for(
    admission: Admission, owner: NodeId, key: SwarmKey | None, says: str | None
) -> None:
    text = opening(owner, key)
    if says is None:
        admission.check_open(text)
        return
    with pytest.raises(NotAdmitted, match=says) as caught:
        admission.check_open(text)
    assert caught.value.hint


def test_a_proof_is_no_good_in_another_owners_opening_or_in_one_that_expires_later() -> None:
    from msgspec.structs import replace

    admission, text = Admission(swarm_key=KEY), opening(ALICE, KEY)
    for stolen in (
        replace(text, owner=BOB),
        replace(text, session=SessionId("2" * 32)),
        replace(text, expires_unix_s=EXPIRES + 1),
    ):
        with pytest.raises(NotAdmitted):
            admission.check_open(stolen)


def test_an_owners_line_waits_only_where_its_owner_is_let_in() -> None:
    Admission(swarm_key=KEY).check_owner_line(BOB)  # its link has shown the key
    with pytest.raises(NotAdmitted):
        Admission(drivers=ONLY_ALICE).check_owner_line(BOB)


@pytest.mark.parametrize(
    ("addresses", "admission", "open_to_anyone", "says"),
    [
        (["127.0.0.1:0"], Admission(), False, None),
        (["[::1]:7800"], Admission(), False, None),
        (["0.0.0.0:7800"], Admission(), False, "strangers may reach 0.0.0.0:7800"),
        (["[::]:7800"], Admission(), False, "strangers may reach"),
        (["127.0.0.1:7800", "203.0.113.9:7800"], Admission(), False, "strangers may reach 203.0.113.9:7800"),
        (["node.example:7800"], Admission(), False, "strangers may reach"),
        (["0.0.0.0:7800"], Admission(), True, None),
        (["0.0.0.0:7800"], Admission(swarm_key=KEY), False, None),
        (["0.0.0.0:7800"], Admission(drivers=ONLY_ALICE), False, None),
        (["0.0.0.0:7800"], Admission(swarm_key=KEY), True, "not both"),
        (["127.0.0.1:7800"], Admission(drivers=ONLY_ALICE), True, "not both"),
    ],
)
def test_who_serves_beyond_this_machine_says_whom(
    addresses: list[str], admission: Admission, open_to_anyone: bool, says: str | None
) -> None:
    if says is None:
        check_exposure(addresses, admission, open_to_anyone=open_to_anyone)
        return
    with pytest.raises(UsageError, match=says) as caught:
        check_exposure(addresses, admission, open_to_anyone=open_to_anyone)
    assert "--open-to-anyone" in caught.value.hint


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("LOCALHOST:1", True),
        ("[::1]:1", True),
        ("[::1%lo]:1", True),
        ("0.0.0.0:1", False),
        ("10.0.0.5:1", False),
        ("[fe80::1%eth0]:1", False),
        ("localhost.example:1", False),
    ],
)
def test_only_what_no_other_machine_can_reach_is_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_a_list_of_drivers_is_ids_and_files_with_comments(tmp_path: Path) -> None:
    listed = tmp_path / "drivers"
    listed.write_text(f"# ours\n\n{ALICE}   # Alice's laptop\n")
    assert AllowList.read([str(listed), BOB.upper()]) == AllowList(frozenset({ALICE, BOB}))
    assert AllowList.read([]) == AllowList(frozenset())


@pytest.mark.parametrize("line", ["alice", "a" * 63, f"{ALICE} Alice", f"{ALICE},{BOB}", "g" * 64])
def test_a_line_that_is_no_id_is_refused_by_file_and_number(tmp_path: Path, line: str) -> None:
    listed = tmp_path / "drivers"
    listed.write_text(f"{ALICE}\n{line}\n")
    with pytest.raises(ConfigError, match=r"drivers, line 2") as caught:
        AllowList.read([str(listed)])
    assert caught.value.hint


@pytest.mark.parametrize("entry", ["no-such-file", "a" * 63, ""])
def test_an_entry_that_is_neither_id_nor_file_is_refused_with_what_it_should_be(entry: str) -> None:
    with pytest.raises(ConfigError, match="neither a node id nor a list") as caught:
        AllowList.read([entry])
    assert "64 hex" in caught.value.hint


QUOTAS = Quotas(sessions=4, sessions_per_owner=2, kv_share_per_owner=0.5, waiting=4, waiting_per_peer=2)


@pytest.mark.parametrize(
    ("of_owner", "of_all", "tokens", "says"),
    [
        (Usage(), Usage(), 500, None),
        (Usage(1, 400), Usage(3, 900), 100, None),
        (Usage(), Usage(4, 10), 1, "4 sessions are open here"),
        (Usage(2, 10), Usage(2, 10), 1, "2 sessions open here, the limit for one"),
        (Usage(), Usage(), 501, "one driver may hold 500 of 1000"),
        (Usage(1, 400), Usage(1, 400), 101, "holds 400 tokens"),
    ],
)
def test_a_session_over_a_quota_is_refused_with_the_numbers(
    of_owner: Usage, of_all: Usage, tokens: int, says: str | None
) -> None:
    asked = Asked(SESSION, ALICE, tokens)
    if says is None:
        check_session(QUOTAS, asked, of_owner=of_owner, of_all=of_all, kv_tokens=1000)
        return
    with pytest.raises(SessionRefused, match=says) as caught:
        check_session(QUOTAS, asked, of_owner=of_owner, of_all=of_all, kv_tokens=1000)
    assert caught.value.hint


@given(st.lists(st.tuples(st.sampled_from([ALICE, BOB]), st.integers(1, 400)), max_size=30))
def test_whatever_is_asked_no_driver_holds_more_than_its_share_and_the_other_finds_room(
    asked: list[tuple[NodeId, int]],
) -> None:
    quotas, held, sessions = Quotas(kv_share_per_owner=STRANGERS_KV_SHARE), {ALICE: 0, BOB: 0}, {ALICE: 0, BOB: 0}
    for owner, tokens in asked:
        of_owner, of_all = Usage(sessions[owner], held[owner]), Usage(sum(sessions.values()), sum(held.values()))
        fits = held[owner] + tokens <= 500
        try:
            check_session(quotas, Asked(SESSION, owner, tokens), of_owner=of_owner, of_all=of_all, kv_tokens=1000)
        except SessionRefused:
            assert not fits
        else:
            assert fits
            held[owner] += tokens
            sessions[owner] += 1


@pytest.mark.parametrize(("of_peer", "of_all", "says"), [(0, 0, None), (1, 3, None), (2, 2, "limit for one"), (0, 4, "limit")])
def test_waiting_lines_are_bounded_for_each_and_for_all(of_peer: int, of_all: int, says: str | None) -> None:
    if says is None:
        check_waiting(QUOTAS, ALICE, of_peer=of_peer, of_all=of_all)
        return
    with pytest.raises(SessionRefused, match=says):
        check_waiting(QUOTAS, ALICE, of_peer=of_peer, of_all=of_all)

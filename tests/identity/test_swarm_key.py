"""The key of a private swarm: how it is written, and what its proofs are good for."""

from __future__ import annotations

import os
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import IdentityError, NotAdmitted, UsageError
from farflung.core.ids import NodeId, SessionId
from farflung.identity.swarm_key import SwarmKey, check_link_proof, link_proof

KEY, OTHER = SwarmKey(bytes(range(32))), SwarmKey(bytes(32))
ALICE, BOB = NodeId("a" * 64), NodeId("b" * 64)
SESSION, NEXT = SessionId("1" * 32), SessionId("2" * 32)
GOLDEN = "farflung-swarm-1-aaaqeayeaudaocajbifqydiob4ibceqtcqkrmfyydenbwha5dyp2eeik"

posix_only = pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")

ids = st.text("0123456789abcdef", min_size=64, max_size=64).map(NodeId)


@given(st.binary(min_size=32, max_size=32))
def test_a_key_reads_as_it_was_written(secret: bytes) -> None:
    key = SwarmKey(secret)
    assert SwarmKey.parse(f"  {key.text}\n") == key
    assert key.text not in repr(key)


def test_text_and_proofs_are_those_of_every_release() -> None:
    assert KEY.text == GOLDEN
    assert KEY.fingerprint == "9ed630ccd74c5265"
    assert KEY.link_proof(ALICE, BOB).hex() == "77742bdab9aaee53a962fffd653cf5763b2988a743e45111bf888486edd4c776"
    assert (
        KEY.open_proof(ALICE, SESSION, 1_700_000_000.0).hex()
        == "ee922f3450b64730ef9948e3978ce8ea31002f510a6a27c84db1d24a367d970d"
    )


@given(st.integers(17, len(GOLDEN) - 1), st.sampled_from(string.ascii_lowercase + "234567"))
def test_one_wrong_letter_is_told(at: int, letter: str) -> None:
    if GOLDEN[at] != letter:
        with pytest.raises(IdentityError, match="typo") as caught:
            SwarmKey.parse(GOLDEN[:at] + letter + GOLDEN[at + 1 :])
        assert caught.value.hint


@pytest.mark.parametrize("text", ["", "x", GOLDEN[:-1], GOLDEN + "a", GOLDEN.replace("-1-", "-2-"), GOLDEN.upper(), "ä" * 73])
def test_what_is_no_key_is_refused_without_being_quoted(text: str) -> None:
    with pytest.raises(IdentityError) as caught:
        SwarmKey.parse(text)
    assert len(text) < 2 or text not in caught.value.message + caught.value.hint


def test_a_secret_of_another_length_is_no_key() -> None:
    with pytest.raises(IdentityError, match="31"):
        SwarmKey(bytes(31))


def test_a_key_file_is_for_its_user_alone_and_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "swarm.key"
    KEY.write(path)
    assert SwarmKey.read(path) == KEY
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="there already"):
        OTHER.write(path)
    assert SwarmKey.read(path) == KEY


@posix_only
def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    KEY.write(path)
    path.chmod(0o640)
    with pytest.raises(IdentityError, match="0640") as caught:
        SwarmKey.read(path)
    assert "chmod 600" in caught.value.hint


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"x" * 10_000])
def test_a_file_without_a_key_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "swarm.key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(IdentityError, match=r"swarm\.key") as caught:
        SwarmKey.read(path)
    assert caught.value.hint


def test_an_open_proof_fits_its_owner_its_session_and_its_expiry_alone() -> None:
    proof = KEY.open_proof(ALICE, SESSION, 1000.0)
    KEY.check_open_proof(proof, ALICE, SESSION, 1000.0)
    for key, shown, owner, session, expires in (
        (KEY, proof, BOB, SESSION, 1000.0),
        (KEY, proof, ALICE, NEXT, 1000.0),
        (KEY, proof, ALICE, SESSION, 1000.5),
        (OTHER, proof, ALICE, SESSION, 1000.0),
        (KEY, proof[:-1], ALICE, SESSION, 1000.0),
        (KEY, b"", ALICE, SESSION, 1000.0),
        (KEY, KEY.link_proof(ALICE, BOB), ALICE, SESSION, 1000.0),
    ):
        with pytest.raises(NotAdmitted) as caught:
            key.check_open_proof(shown, owner, session, expires)
        assert caught.value.hint


@given(ids, ids)
def test_a_link_proof_is_of_one_to_another_and_no_other_way_round(me: NodeId, peer: NodeId) -> None:
    proof = KEY.link_proof(me, peer)
    check_link_proof(KEY, proof, peer, me)
    if me != peer:
        with pytest.raises(NotAdmitted):
            check_link_proof(KEY, proof, me, peer)


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (None, None, None),
        (KEY, KEY, None),
        (KEY, None, "shows no swarm key"),
        (None, KEY, "in a private swarm"),
        (KEY, OTHER, "another swarm key"),
    ],
)
def test_two_ends_link_where_both_have_the_key_or_neither_has_one(
    ours: SwarmKey | None, theirs: SwarmKey | None, says: str | None
) -> None:
    proof = link_proof(theirs, BOB, ALICE)
    if says is None:
        check_link_proof(ours, proof, ALICE, BOB)
        return
    with pytest.raises(NotAdmitted, match=says) as caught:
        check_link_proof(ours, proof, ALICE, BOB)
    assert caught.value.hint

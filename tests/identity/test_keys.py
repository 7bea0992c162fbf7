from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import BadSignature, IdentityError, UsageError
from farflung.core.ids import NodeId, parse_node_id
from farflung.identity import Identity, verify

posix_only = pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")


def test_a_node_id_is_a_public_key_in_hex() -> None:
    identity = Identity.generate()
    assert parse_node_id(identity.node_id) == identity.node_id
    assert identity.node_id != Identity.generate().node_id


@given(text=st.binary(max_size=300))
def test_a_signature_fits_its_text_its_signer_and_its_purpose_alone(text: bytes) -> None:
    ours, other = Identity.generate(), Identity.generate()
    signature = ours.sign(text, context="open/1")
    verify(ours.node_id, text, signature, context="open/1")
    for node_id, said, context in (
        (other.node_id, text, "open/1"),
        (ours.node_id, text + b"\0", "open/1"),
        (ours.node_id, text, "record/1"),
    ):
        with pytest.raises(BadSignature):
            verify(node_id, said, signature, context=context)


@given(signature=st.binary(max_size=80))
def test_arbitrary_bytes_are_no_signature(signature: bytes) -> None:
    with pytest.raises(BadSignature):
        verify(Identity.generate().node_id, b"text", signature, context="open/1")


@pytest.mark.parametrize("node_id", ["", "zz", "AB" * 32, "é" * 64, "ff" * 32])
def test_what_is_no_key_has_signed_nothing(node_id: str) -> None:
    with pytest.raises(BadSignature):
        verify(NodeId(node_id), b"text", bytes(64), context="open/1")


@pytest.mark.parametrize("context", ["", "open/1\0", "Open", "a b"])
def test_a_context_that_could_be_mistaken_for_another_is_refused(context: str) -> None:
    with pytest.raises(UsageError):
        Identity.generate().sign(b"text", context=context)


def test_the_key_in_a_file_stays_the_same(tmp_path: Path) -> None:
    path = tmp_path / "state" / "node.key"
    assert Identity.load_or_create(path).node_id == Identity.load_or_create(path).node_id
    assert [entry.name for entry in path.parent.iterdir()] == ["node.key"]


@posix_only
def test_a_key_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(IdentityError, match="0644") as caught:
        Identity.load_or_create(path)
    assert "chmod 600" in caught.value.hint


def test_starting_many_times_at_once_makes_one_key(tmp_path: Path) -> None:
    path, found = tmp_path / "node.key", []
    threads = [threading.Thread(target=lambda: found.append(Identity.load_or_create(path).node_id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {Identity.load_or_create(path).node_id}


@pytest.mark.parametrize("content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_garbled_key_file_is_named_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match=r"node\.key") as caught:
        Identity.load_or_create(path)
    assert caught.value.hint
    assert path.read_bytes() == content


def test_keys_of_other_kinds_and_encrypted_ones_are_refused(tmp_path: Path) -> None:
    ec = generate_ec_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    locked = Identity.generate().private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    for name, content in (("ec", ec), ("locked", locked)):
        path = tmp_path / name
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(IdentityError, match=name):
            Identity.load_or_create(path)


def test_a_key_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "node.key"):
        with pytest.raises(IdentityError, match="cannot be used"):
            Identity.load_or_create(path)


def test_a_private_key_does_not_print_itself() -> None:
    identity = Identity.generate()
    assert identity.private_key.private_bytes_raw().hex() not in repr(identity)
    assert identity.node_id in repr(identity)

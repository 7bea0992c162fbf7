from __future__ import annotations

import datetime
import ssl
import tempfile
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from farflung.core.errors import IdentityError
from farflung.identity import Identity, certificates, client_context, peer_node_id, server_context


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends after a handshake. Raises ssl.SSLError of whichever end refuses."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    dialler, acceptor = client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)
    done: set[ssl.SSLObject] = set()
    while len(done) < 2:
        for end in (dialler, acceptor):
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                continue
    return dialler, acceptor


def test_each_end_learns_the_key_that_the_other_has_proven() -> None:
    ours, theirs = Identity.generate(), Identity.generate()
    dialler, acceptor = shake_hands(client_context(ours), server_context(theirs))
    assert peer_node_id(dialler) == theirs.node_id
    assert peer_node_id(acceptor) == ours.node_id
    assert dialler.version() == "TLSv1.3"


def test_contexts_accept_strictly_checked_chains() -> None:
    client, server = client_context(Identity.generate()), server_context(Identity.generate())
    for context in (client, server):
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    shake_hands(client, server)


def test_no_clock_is_too_wrong_for_a_certificate() -> None:
    ours = Identity.generate()
    dialler, _ = shake_hands(client_context(Identity.generate()), server_context(ours))
    leaf = x509.load_der_x509_certificate(dialler.getpeercert(binary_form=True) or b"")
    assert leaf.not_valid_before_utc <= datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    assert leaf.not_valid_after_utc.year == 9999


def test_older_tls_is_refused() -> None:
    client = client_context(Identity.generate())
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        shake_hands(client, server_context(Identity.generate()))


def test_an_end_without_a_certificate_is_refused() -> None:
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname = False
    stranger.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError):
        shake_hands(stranger, server_context(Identity.generate()))


def test_a_leaf_under_another_authority_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLError):
        shake_hands(client_context(Identity.generate()), _ec_context(tmp_path, published=False))


def test_a_leaf_with_another_kind_of_key_names_no_node(tmp_path: Path) -> None:
    dialler, _ = shake_hands(client_context(Identity.generate()), _ec_context(tmp_path, published=True))
    with pytest.raises(IdentityError, match="Ed25519"):
        peer_node_id(dialler)


def test_a_leaf_of_a_version_that_does_not_exist_names_no_node(tmp_path: Path) -> None:
    identity = Identity.generate()
    version = b"\xa0\x03\x02\x01"
    body = certificates._leaf(identity).tbs_certificate_bytes.replace(version + b"\x02", version + b"\x05", 1)
    signature = certificates._PUBLISHED_KEY.sign(body)
    inner = body + bytes.fromhex("300506032b6570") + b"\x03\x41\x00" + signature  # Ed25519, a bit string
    path = tmp_path / "chain.pem"
    key = identity.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(key + ssl.DER_cert_to_PEM_cert(b"\x30\x82" + len(inner).to_bytes(2, "big") + inner).encode())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    dialler, _ = shake_hands(client_context(Identity.generate()), context)
    with pytest.raises(IdentityError, match="cannot be read"):
        peer_node_id(dialler)


def test_no_key_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    client_context(Identity.generate())
    assert list(tmp_path.iterdir()) == []


def _ec_context(folder: Path, *, published: bool) -> ssl.SSLContext:
    """A server with an elliptic-curve leaf, issued under the published key or its own."""
    key = generate_ec_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stranger")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(certificates._PUBLISHED_NAME if published else name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC))
    )
    leaf = builder.sign(certificates._PUBLISHED_KEY, None) if published else builder.sign(key, SHA256())
    path = folder / "chain.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + leaf.public_bytes(Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context

"""TLS 1.3 contexts in which both ends prove the Ed25519 key that is their node id.

Python's ``ssl`` has no callback to judge a peer's certificate: a self-signed one is either rejected or not shown. So every
node's key sits in a leaf certificate under one certificate authority whose *private key is published right here*. Anybody
can issue any leaf under it: **the authority vouches for nothing**. Security rests on two other things: TLS makes the peer
prove that it holds the private key of the leaf it shows, and both ends compare that key (``peer_node_id``) with the node id
they expect. A connection whose leaf was not compared is a connection to a stranger.

Certificates never expire: nodes with wrong clocks must be able to talk, and a key is revoked by no longer expecting its id.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
import ssl
import tempfile
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from farflung.core.errors import IdentityError
from farflung.core.ids import NodeId
from farflung.identity.keys import Identity

_PUBLISHED_KEY = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"farflung published certificate authority 1").digest())
_PUBLISHED_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Farflung (published key, vouches for nothing)")])
_START = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_END = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)  # RFC 5280, 4.1.2.5: no well-defined end


def server_context(identity: Identity) -> ssl.SSLContext:
    """For accepting: TLS 1.3, the dialling side must show a leaf. Compare it with ``peer_node_id``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # links are not resumed: a ticket would be bytes for nothing
    return _pinned(context, identity)


def client_context(identity: Identity) -> ssl.SSLContext:
    """For dialling: TLS 1.3, shows our leaf and demands one. Compare it with ``peer_node_id``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the name of a node is its key
    return _pinned(context, identity)


def peer_node_id(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> NodeId:
    """The node id whose key the peer has proven to hold; valid once the handshake is done.

    Raises IdentityError where the peer's leaf holds no Ed25519 key.
    """
    leaf = ssl_object.getpeercert(binary_form=True)
    if leaf is None:
        raise IdentityError("the peer showed no certificate")
    try:
        key = x509.load_der_x509_certificate(leaf).public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise IdentityError(f"the peer's certificate ({len(leaf)} bytes) cannot be read: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise IdentityError("the peer's certificate holds a key of another kind than Ed25519")
    return NodeId(key.public_bytes_raw().hex())


def _pinned(context: ssl.SSLContext, identity: Identity) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=_published_authority().public_bytes(Encoding.DER))
    # ssl reads chains from files only. The key in the file is encrypted under a password that exists in this process alone,
    # so that not even a crash between writing and deleting leaves it readable.
    password = secrets.token_bytes(24).hex()
    key = identity.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password.encode()))
    with tempfile.TemporaryDirectory(prefix="farflung-") as folder:
        chain = Path(folder, "leaf.pem")
        chain.touch(mode=0o600)
        chain.write_bytes(key + _leaf(identity).public_bytes(Encoding.PEM))
        context.load_cert_chain(chain, password=password)
    return context


def _leaf(identity: Identity) -> x509.Certificate:
    public_key = identity.private_key.public_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.node_id)])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        _certificate(name, public_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(_PUBLISHED_KEY.public_key()), critical=False)
        .sign(_PUBLISHED_KEY, algorithm=None)
    )


@cache
def _published_authority() -> x509.Certificate:
    public_key = _PUBLISHED_KEY.public_key()
    return (
        _certificate(_PUBLISHED_NAME, public_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .sign(_PUBLISHED_KEY, algorithm=None)
    )


def _certificate(subject: x509.Name, public_key: Ed25519PublicKey) -> x509.CertificateBuilder:
    # The serial number follows from the key, so that the same key always gives the same bytes.
    serial = int.from_bytes(hashlib.sha256(public_key.public_bytes_raw()).digest()[:16], "big") | 1
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_PUBLISHED_NAME)
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(_START)
        .not_valid_after(_END)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )

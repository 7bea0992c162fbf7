"""Ed25519 keys (RFC 8032) and signatures that are good for one purpose only.

A node id *is* a public key, so nothing has to be looked up to check a signature. Every signature covers
``b"farflung/" + context + b"\\0" + text``: one made for a purpose (a ``context`` such as ``open/1``) never passes for another.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from farflung.core.errors import BadSignature, IdentityError, UsageError
from farflung.core.ids import NodeId, parse_node_id

_KEY_FILE_BYTES = 16 * 1024  # an Ed25519 key in PEM has 119; more is another kind of file
_CONTEXT = re.compile(r"[a-z0-9][a-z0-9/_-]*")


class Identity:
    """One node's private key. The key itself never leaves the process but for its own file.

    Args:
        private_key: see ``generate`` and ``load_or_create`` for the usual ways to come by one.
    """

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self._node_id = NodeId(private_key.public_key().public_bytes_raw().hex())

    def __repr__(self) -> str:
        return f"Identity({self._node_id})"

    @classmethod
    def generate(cls) -> Identity:
        """A new key from the system's randomness, in memory only."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The key in ``path`` (PKCS 8, PEM), made there with mode 0600 if there is none.

        Creation is atomic: of two processes that start at once, both end with the same key, and a crash leaves none or a
        whole one. Raises IdentityError where the file cannot be read or written, holds no Ed25519 key, or can be read by
        other users of the machine.
        """
        try:
            if not path.exists():
                _create(path, Ed25519PrivateKey.generate())
            pem = _read(path)
        except OSError as error:
            raise IdentityError(
                f"the key file {path} cannot be used: {error.strerror or error}",
                hint="give the folder and the file to the user this runs as, or name another place",
            ) from error
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
            raise IdentityError(
                f"the key file {path} ({len(pem)} bytes) holds no readable private key",
                hint="restore it from a copy; if you move it away, a new key and with it a new node id is made",
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityError(f"the key file {path} holds a key of another kind than Ed25519", hint="name another file")
        return cls(key)

    @property
    def node_id(self) -> NodeId:
        """The public key, 64 lower-case hex digits."""
        return self._node_id

    @property
    def private_key(self) -> Ed25519PrivateKey:
        """For ``identity.certificates``; everything else signs."""
        return self._private_key

    def sign(self, text: bytes, *, context: str) -> bytes:
        """64 bytes over ``text``, good for ``context`` alone.

        Args:
            text: what is signed.
            context: the purpose and its version, e.g. ``open/1``. Raises UsageError where it is not lower-case words.
        """
        return self._private_key.sign(_bound(text, context))


def verify(node_id: NodeId, text: bytes, signature: bytes, *, context: str) -> None:
    """Returns if ``node_id`` signed ``text`` for ``context``; raises BadSignature otherwise (also if the id is no key)."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(parse_node_id(node_id)))
        key.verify(signature, _bound(text, context))
    except (InvalidSignature, ValueError) as error:
        raise BadSignature(f"the signature for {context} over {len(text)} bytes is not that of node {node_id}") from error
    except UsageError as error:
        raise BadSignature(f"{node_id[:80]!r} is not a node id, so it has signed nothing") from error


def _bound(text: bytes, context: str) -> bytes:
    if not _CONTEXT.fullmatch(context):
        raise UsageError(f"{context!r} is no signing context", hint="write lower-case words and a version, e.g. open/1")
    return b"farflung/" + context.encode() + b"\0" + text


def _create(path: Path, key: Ed25519PrivateKey) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)  # unlike a rename it never replaces the key another process has just put there
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if os.name == "posix" and mode & 0o077:
            raise IdentityError(
                f"the key file {path} has mode {mode:04o}: other users of this machine can use the key",
                hint=f"chmod 600 {path}, and make a new key if somebody may have read it",
            )
        return file.read(_KEY_FILE_BYTES)

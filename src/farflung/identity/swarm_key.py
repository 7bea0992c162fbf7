"""The key of a private swarm: 32 random bytes that its nodes and drivers share, and proofs of knowing them.

A *link proof* goes into the hello. TLS has proven both node ids by then, so it is enough that it is bound to who shows it
and to whom. An *open proof* goes into the signed opening of a session, because that reaches later stages through nodes that its
owner does not know: it is bound to the owner, the session and the time it is good until, so that nobody else can use it, nor
the owner another day. A *record proof* marks a member's record in the directory.

Proofs are keyed BLAKE3 (a MAC of 32 bytes) under a key derived for each purpose (BLAKE3 ``derive_key``), compared in constant
time. The secret itself never travels.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
import secrets
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from farflung.core.errors import IdentityError, NotAdmitted, UsageError
from farflung.core.ids import NodeId, SessionId, parse_node_id, parse_session_id, short

PROOF_BYTES = 32

HINT_NO_KEY = "get the swarm's key from who runs it, then --swarm-key FILE or FARFLUNG_SWARM_KEY"
HINT_OTHER_KEY = "compare `farflung key show FILE` on both machines: the fingerprints must be the same"

_SECRET_BYTES = 32
_CHECK_BYTES = 3  # with the secret 35 bytes, which base32 writes without padding; one typo in 16 million passes
_PREFIX = "farflung-swarm-1-"
_TEXT = re.compile(re.escape(_PREFIX) + r"[a-z2-7]{56}")
_FILE_BYTES = 4096  # a key has 74; more is another kind of file


class SwarmKey:
    """The secret and what is derived from it. Its ``repr`` shows the fingerprint alone.

    Args:
        secret: 32 bytes. Raises IdentityError for another number.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) != _SECRET_BYTES:
            raise IdentityError(f"a swarm key has {_SECRET_BYTES} bytes, not {len(secret)}")
        self._secret = secret
        self._open_key = _derive("farflung 1 open proof", secret)
        self._link_key = _derive("farflung 1 link proof", secret)
        self._record_key = _derive("farflung 1 record proof", secret)

    def __repr__(self) -> str:
        return f"SwarmKey({self.fingerprint})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SwarmKey) and hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @classmethod
    def generate(cls, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> SwarmKey:
        return cls(random_bytes(_SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> SwarmKey:
        """The key that ``text`` writes. Raises IdentityError, which never quotes it, where it is none or has a typo."""
        text = text.strip()
        if not _TEXT.fullmatch(text):
            raise IdentityError(
                f"{len(text)} characters are no swarm key: it is {_PREFIX} and 56 letters and digits",
                hint="copy the whole line, or make a new key: farflung key new FILE",
            )
        whole = _unwritten(text.removeprefix(_PREFIX))
        secret = whole[:_SECRET_BYTES]
        if not hmac.compare_digest(whole[_SECRET_BYTES:], _check(secret)):
            raise IdentityError("the swarm key has a typo: its checksum does not fit", hint="copy it again, from the file")
        return cls(secret)

    @staticmethod
    def looks_like_one(text: str) -> bool:
        """Whether ``text`` means to be a key, and not the name of a file."""
        return text.strip().startswith(_PREFIX[:14])

    @classmethod
    def read(cls, path: Path) -> SwarmKey:
        """The key in a file. Raises IdentityError where there is none, or other users of the machine can read it."""
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                data = file.read(_FILE_BYTES)
        except OSError as error:
            raise IdentityError(
                f"the swarm key {path} cannot be read: {error.strerror or error}", hint=f"make one: farflung key new {path}"
            ) from error
        if os.name == "posix" and mode & 0o077:
            raise IdentityError(
                f"the swarm key {path} has mode {mode:04o}: other users of this machine can use it", hint=f"chmod 600 {path}"
            )
        try:
            return cls.parse(data.decode("ascii"))
        except UnicodeDecodeError as error:
            raise IdentityError(f"{path} holds no swarm key: it is not text", hint="name another file") from error
        except IdentityError as error:
            raise IdentityError(f"{path}: {error.message}", hint=error.hint) from error

    def write(self, path: Path) -> None:
        """Makes a file of mode 0600. Raises UsageError where one is there, IdentityError where none can be made."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise UsageError(
                f"{path} is there already", hint="name another file; who replaces a key locks out all who have the old one"
            ) from error
        except OSError as error:
            raise IdentityError(f"{path} cannot be written: {error.strerror or error}") from error
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(self.text + "\n")

    @property
    def text(self) -> str:
        """The key as people copy it: a prefix, then base32 of the secret and three bytes that tell a typo."""
        return _PREFIX + base64.b32encode(self._secret + _check(self._secret)).decode("ascii").lower()

    @property
    def fingerprint(self) -> str:
        """16 hex digits, to compare two machines' keys with; they say nothing else about it."""
        return _derive("farflung 1 fingerprint", self._secret)[:8].hex()

    # ---- a session's opening ----

    def open_proof(self, owner: NodeId, session: SessionId, expires_unix_s: float) -> bytes:
        """What ``owner`` puts into the opening of ``session`` that is good until then."""
        said = bytes.fromhex(parse_node_id(owner)) + bytes.fromhex(parse_session_id(session))
        return blake3(said + struct.pack("<d", expires_unix_s), key=self._open_key).digest()

    def check_open_proof(self, proof: bytes, owner: NodeId, session: SessionId, expires_unix_s: float) -> None:
        """Returns if the proof is that of this owner, session and expiry; raises NotAdmitted otherwise."""
        if not proof:
            raise NotAdmitted(f"driver {short(owner)} shows no swarm key, and this swarm is private", hint=HINT_NO_KEY)
        if not hmac.compare_digest(proof, self.open_proof(owner, session, expires_unix_s)):
            raise NotAdmitted(f"driver {short(owner)} has another swarm key than this node", hint=HINT_OTHER_KEY)

    # ---- a node's record in the directory ----

    def record_proof(self, node_id: NodeId) -> str:
        """What the record of a member says, in hex. Records are public; each counts under its own node's signature only."""
        return blake3(bytes.fromhex(parse_node_id(node_id)), key=self._record_key).hexdigest()

    def is_record_proof(self, proof: str, node_id: NodeId) -> bool:
        return hmac.compare_digest(proof.encode(), self.record_proof(node_id).encode())

    # ---- a link's hello ----

    def link_proof(self, me: NodeId, peer: NodeId) -> bytes:
        """What ``me`` says to ``peer``."""
        said = bytes.fromhex(parse_node_id(me)) + bytes.fromhex(parse_node_id(peer))
        return blake3(said, key=self._link_key).digest()


def link_proof(key: SwarmKey | None, me: NodeId, peer: NodeId) -> bytes:
    """For the hello of ``me`` to ``peer``; empty where there is no key."""
    return b"" if key is None else key.link_proof(me, peer)


def check_link_proof(key: SwarmKey | None, proof: bytes, me: NodeId, peer: NodeId) -> None:
    """Returns if ``peer`` knows the key this end has, or neither has one; raises NotAdmitted otherwise.

    An end without a key turns away one that has it, too: the other end is about to, and only this one can tell its user why.
    """
    if key is None:
        if proof:
            raise NotAdmitted(f"node {short(peer)} is in a private swarm, and no swarm key is set here", hint=HINT_NO_KEY)
        return
    if not proof:
        raise NotAdmitted(
            f"node {short(peer)} shows no swarm key, and here one is set",
            hint="start it with this swarm's key, or leave the key out to use an open swarm",
        )
    if not hmac.compare_digest(proof, key.link_proof(peer, me)):
        raise NotAdmitted(f"node {short(peer)} has another swarm key than this end", hint=HINT_OTHER_KEY)


def _derive(purpose: str, secret: bytes) -> bytes:
    return blake3(secret, derive_key_context=purpose).digest()


def _check(secret: bytes) -> bytes:
    return _derive("farflung 1 checksum", secret)[:_CHECK_BYTES]


def _unwritten(text: str) -> bytes:
    try:
        return base64.b32decode(text.upper())
    except binascii.Error as error:  # 56 characters of the alphabet always decode; a newer Python may judge otherwise
        raise IdentityError("the swarm key cannot be decoded", hint="copy it again, from the file") from error

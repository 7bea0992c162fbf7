"""Statements of nodes: small JSON texts that count only under their author's own key.

What travels and is stored is the text as it was signed, never a re-encoding of it. Whoever reads one checks it again: a
directory is not trusted, it can at worst withhold. A statement carries its author's wall-clock time and how long it
holds, so that one replayed later is refused even by a directory that has forgotten it.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import Struct

from farflung.core.errors import FarflungError, RecordRefused
from farflung.core.ids import NodeId, parse_node_id, short
from farflung.identity.keys import Identity, verify

MAX_TEXT_BYTES = 16 * 1024
MAX_SKEW_S = 120.0
"""Clocks of volunteers' machines are mostly within a second; two minutes covers the ones that nobody set well."""
MIN_TTL_S, MAX_TTL_S = 1.0, 600.0
_SIGNATURE_BYTES = 64


class SignedText(Struct, frozen=True):
    """JSON of a statement and the author's signature over it (base64 where it travels as JSON itself)."""

    text: bytes
    signature: bytes


class Statement(Struct, frozen=True, kw_only=True):
    """What every statement says.

    Attributes:
        node_id: the author.
        sequence: a newer statement of the same kind has a greater one; below 2**63.
        issued_unix_s: the author's wall clock when it signed.
        ttl_s: how long it holds, from 1 to 600 s.
    """

    node_id: NodeId
    sequence: int
    issued_unix_s: float
    ttl_s: float


_S = TypeVar("_S", bound=Statement)


def sign_statement(identity: Identity, statement: Statement, *, context: str) -> SignedText:
    """Raises RecordRefused where ``statement`` names another node than ``identity``."""
    if statement.node_id != identity.node_id:
        raise RecordRefused(f"node {short(identity.node_id)} cannot sign a record for node {short(statement.node_id)}")
    text = msgspec.json.encode(statement)
    return SignedText(text=text, signature=identity.sign(text, context=context))


def open_statement(signed: SignedText, kind: type[_S], *, context: str, now_unix_s: float) -> _S:
    """The statement, if it is well-formed, really its author's, and of this time.

    Raises:
        RecordRefused: too big, malformed, or issued too long ago or in the future by more than ``MAX_SKEW_S``.
        BadSignature: not signed by the node it names, or signed for another purpose.
    """
    if len(signed.text) > MAX_TEXT_BYTES:
        raise RecordRefused(f"a record of {len(signed.text)} bytes is over the limit of {MAX_TEXT_BYTES} bytes")
    if len(signed.signature) != _SIGNATURE_BYTES:
        raise RecordRefused(f"a signature of {len(signed.signature)} bytes is none: Ed25519 makes {_SIGNATURE_BYTES}")
    try:
        statement = msgspec.json.decode(signed.text, type=kind)
        parse_node_id(statement.node_id)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, FarflungError) as error:
        raise RecordRefused(f"a record cannot be read: {str(error)[:200]}") from error
    verify(statement.node_id, signed.text, signed.signature, context=context)
    _check(statement, now_unix_s)
    return statement


def _check(statement: Statement, now_unix_s: float) -> None:
    who = f"the record of node {short(statement.node_id)}"
    if not 0 <= statement.sequence < 2**63:
        raise RecordRefused(f"{who} has sequence {str(statement.sequence)[:30]}, which is out of range")
    if not MIN_TTL_S <= statement.ttl_s <= MAX_TTL_S:
        raise RecordRefused(f"{who} wants to hold for {statement.ttl_s:g} s; {MIN_TTL_S:g} to {MAX_TTL_S:g} s are allowed")
    age_s = now_unix_s - statement.issued_unix_s
    if age_s < -MAX_SKEW_S:
        raise RecordRefused(f"{who} was issued {-age_s:.0f} s in the future", hint=_clock_hint())
    if age_s > statement.ttl_s + MAX_SKEW_S:
        raise RecordRefused(f"{who} was issued {age_s:.0f} s ago and held for {statement.ttl_s:g} s", hint=_clock_hint())


def _clock_hint() -> str:
    return f"compare the clocks of both machines (NTP); they may differ by {MAX_SKEW_S:g} s"

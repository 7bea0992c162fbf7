"""Names of things that travel: nodes, sessions, models. All are plain strings at run time, distinct types to the checker."""

from __future__ import annotations

import re
from typing import NewType

from farflung.core.errors import UsageError

NodeId = NewType("NodeId", str)
"""An Ed25519 public key (RFC 8032), 64 lower-case hex digits. Drivers have one too."""

SessionId = NewType("SessionId", str)
"""128 random bits, 32 lower-case hex digits."""

ModelDigest = NewType("ModelDigest", str)
"""Merkle root of a model (see ``engine.manifest``), 64 lower-case hex digits (BLAKE3-256)."""

_HEX = {32: re.compile(r"[0-9a-f]{32}"), 64: re.compile(r"[0-9a-f]{64}")}


def parse_node_id(text: str) -> NodeId:
    """Raises UsageError where ``text`` is not 64 lower-case hex digits."""
    if not _HEX[64].fullmatch(text):
        raise UsageError(f"{text[:80]!r} is not a node id: expected 64 lower-case hex digits, got {len(text)} characters")
    return NodeId(text)


def parse_session_id(text: str) -> SessionId:
    """Raises UsageError where ``text`` is not 32 lower-case hex digits."""
    if not _HEX[32].fullmatch(text):
        raise UsageError(f"{text[:80]!r} is not a session id: expected 32 lower-case hex digits, got {len(text)} characters")
    return SessionId(text)


def parse_model_digest(text: str) -> ModelDigest:
    """Raises UsageError where ``text`` is not 64 lower-case hex digits."""
    if not _HEX[64].fullmatch(text):
        raise UsageError(f"{text[:80]!r} is not a model digest: expected 64 lower-case hex digits, got {len(text)} characters")
    return ModelDigest(text)


def short(identifier: str) -> str:
    """The first eight digits, for people."""
    return identifier[:8]

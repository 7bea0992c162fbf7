"""What a node says about itself, and who asks for it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from farflung.core.errors import FarflungError, RecordRefused, UsageError
from farflung.core.ids import ModelDigest, parse_model_digest, short
from farflung.core.model import LayerRange
from farflung.identity.keys import Identity
from farflung.swarm.addresses import can_be_dialled
from farflung.swarm.signed import SignedText, Statement, open_statement, sign_statement

RECORD_CONTEXT = "record/1"
WITHDRAWAL_CONTEXT = "withdrawal/1"

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_PROOF = re.compile(r"[0-9a-f]{64}")
_MAX_NAME = 256
_MAX_ADDRESSES = 8
_MAX_CODECS = 16
_MAX_CURVE_POINTS = 64
_MAX_LAYERS = 10_000
_MAX_WIDTH = 2**20
_MAX_TOKENS = 2**40


class SignedRecord(SignedText, frozen=True):
    """A ``NodeRecord`` under its node's key."""


class SignedWithdrawal(SignedText, frozen=True):
    """A ``Withdrawal`` under its node's key."""


class NodeRecord(Statement, frozen=True, kw_only=True):
    """One node that serves one layer range of one model.

    Attributes:
        addresses: ``host:port`` to dial, best first; 1 to 8.
        model: name of the model (see ``ModelSpec``), for people.
        family: the ``model_type`` of transformers.
        digest: the model.
        model_layers: decoder layers of the whole model.
        hidden_size: width of the activations, in values.
        layers: the range served.
        t_curve_ms: measured (tokens, milliseconds) of a step, tokens rising; may be empty.
        kv_tokens: KV cells in all, in tokens.
        kv_free_tokens: KV cells free when this was signed.
        codecs: activation codecs it reads and writes.
        engine_class: weight precision and kernel family.
        uplink_bytes_per_s: as receivers measured it; 0 unknown.
        status: a draining node ends its sessions and takes no new ones.
        version: of farflung.
        membership: proof of a private swarm's key (``identity.swarm_key``), 64 hex digits; empty outside of one.
    """

    addresses: tuple[str, ...]
    model: str
    family: str
    digest: ModelDigest
    model_layers: int
    hidden_size: int
    layers: LayerRange
    t_curve_ms: tuple[tuple[int, float], ...] = ()
    kv_tokens: int = 0
    kv_free_tokens: int = 0
    codecs: tuple[str, ...] = ()
    engine_class: str = ""
    uplink_bytes_per_s: float = 0.0
    status: Literal["serving", "draining"] = "serving"
    version: str = ""
    membership: str = ""

    def same_but_for_renewal(self, other: NodeRecord) -> bool:
        """Whether ``other`` says nothing new: only sequence, time of issue and free KV differ."""
        return self == replace(
            other, sequence=self.sequence, issued_unix_s=self.issued_unix_s, kv_free_tokens=self.kv_free_tokens
        )

    def same_place(self, other: NodeRecord) -> bool:
        """Whether every query that matches this record matches ``other`` too."""
        return (self.model, self.digest, self.layers) == (other.model, other.digest, other.layers)


class Withdrawal(Statement, frozen=True, kw_only=True):
    """The node leaves. Its sequence continues that of its records."""


def sign_record(identity: Identity, record: NodeRecord) -> SignedRecord:
    """Raises RecordRefused where the record names another node than ``identity`` or others would refuse what it says."""
    _check(record)
    signed = sign_statement(identity, record, context=RECORD_CONTEXT)
    return SignedRecord(signed.text, signed.signature)


def open_record(signed: SignedText, now_unix_s: float) -> NodeRecord:
    """The record if it can be relied on. Raises RecordRefused, BadSignature (see ``open_statement``)."""
    record = open_statement(signed, NodeRecord, context=RECORD_CONTEXT, now_unix_s=now_unix_s)
    _check(record)
    return record


def sign_withdrawal(identity: Identity, withdrawal: Withdrawal) -> SignedWithdrawal:
    """Raises RecordRefused where it names another node than ``identity``."""
    signed = sign_statement(identity, withdrawal, context=WITHDRAWAL_CONTEXT)
    return SignedWithdrawal(signed.text, signed.signature)


def open_withdrawal(signed: SignedText, now_unix_s: float) -> Withdrawal:
    """Raises RecordRefused, BadSignature (see ``open_statement``)."""
    return open_statement(signed, Withdrawal, context=WITHDRAWAL_CONTEXT, now_unix_s=now_unix_s)


def _check(record: NodeRecord) -> None:
    for fault in _faults(record):
        raise RecordRefused(f"the record of node {short(record.node_id)} is refused: {fault[:300]}")


def _faults(record: NodeRecord) -> Iterator[str]:
    """Lazy, so that the first fault spares the rest."""
    if not 1 <= len(record.addresses) <= _MAX_ADDRESSES:
        yield f"it has {len(record.addresses)} addresses; 1 to {_MAX_ADDRESSES} are allowed"
    for address in record.addresses:
        if not can_be_dialled(address):
            yield f"{address[:80]!r} is no address that others can dial"
    if record.membership and not _PROOF.fullmatch(record.membership):
        yield f"its proof of membership has {len(record.membership)} characters and is none"
    yield from _word_faults(record)
    yield from _model_faults(record)
    if not 0 <= record.kv_free_tokens <= record.kv_tokens <= _MAX_TOKENS:
        yield f"{record.kv_free_tokens} free of {record.kv_tokens} KV tokens make no sense"
    if not (math.isfinite(record.uplink_bytes_per_s) and record.uplink_bytes_per_s >= 0):
        yield f"an uplink of {record.uplink_bytes_per_s} bytes/s makes no sense"
    yield from _curve_faults(record.t_curve_ms)


def _word_faults(record: NodeRecord) -> Iterator[str]:
    for what, text in (("model", record.model), ("version", record.version)):
        if len(text) > _MAX_NAME or not text.isprintable():
            yield f"its {what} {text[:80]!r} is no name"
    if not record.model.strip():
        yield "it names no model"
    for what, words in (("family", (record.family,)), ("codec", record.codecs), ("engine class", (record.engine_class,))):
        for word in words:
            if word and not _WORD.fullmatch(word):
                yield f"its {what} {word[:80]!r} is no word"
    if len(record.codecs) > _MAX_CODECS:
        yield f"it names {len(record.codecs)} codecs; at most {_MAX_CODECS} are allowed"


def _model_faults(record: NodeRecord) -> Iterator[str]:
    try:
        parse_model_digest(record.digest)
    except FarflungError as error:
        yield error.message
    if not 1 <= record.model_layers <= _MAX_LAYERS or record.layers.stop > record.model_layers:
        yield f"layers {record.layers} do not fit a model of {record.model_layers} layers"
    if not 1 <= record.hidden_size <= _MAX_WIDTH:
        yield f"a width of {record.hidden_size} is out of range"


def _curve_faults(curve: tuple[tuple[int, float], ...]) -> Iterator[str]:
    if len(curve) > _MAX_CURVE_POINTS:
        yield f"its T-curve has {len(curve)} points; at most {_MAX_CURVE_POINTS} are allowed"
    if any(not (tokens >= 1 and math.isfinite(ms) and ms >= 0) for tokens, ms in curve):
        yield "its T-curve has a point that makes no sense"
    if any(left[0] >= right[0] for left, right in pairwise(curve)):
        yield "the tokens of its T-curve do not rise"


class Query(Struct, frozen=True, kw_only=True):
    """Which records somebody wants. Raises UsageError where a part makes no sense.

    Attributes:
        model: a name or a digest; empty for every model.
        beside: only nodes that serve the layer just before or just after this range: the neighbours of a stage.
    """

    model: str = ""
    beside: LayerRange | None = None

    def __post_init__(self) -> None:
        if len(self.model) > _MAX_NAME or not self.model.isprintable():
            raise UsageError(f"{self.model[:80]!r} is no name of a model")

    def matches(self, record: NodeRecord) -> bool:
        if self.model and self.model not in (record.digest, record.model):
            return False
        return self.beside is None or self.beside.start - 1 in record.layers or self.beside.stop in record.layers


EVERYTHING = Query()

"""Nodes and clocks for the tests of ``farflung.swarm``."""

from __future__ import annotations

from typing import Any

import msgspec

from farflung.core.ids import ModelDigest
from farflung.core.model import LayerRange
from farflung.identity.keys import Identity
from farflung.swarm.records import NodeRecord, SignedRecord, SignedWithdrawal, Withdrawal, sign_record, sign_withdrawal

NOW = 1_800_000_000.0
DIGEST = ModelDigest("ab" * 32)
OTHER_DIGEST = ModelDigest("cd" * 32)


class Clock:
    """A wall clock that stands until it is set."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def a_record(identity: Identity, **changes: Any) -> NodeRecord:
    """A plain record of ``identity``, but for ``changes``; layers may be written ``"0:6"``."""
    fields: dict[str, Any] = {
        "node_id": identity.node_id,
        "sequence": 1,
        "issued_unix_s": NOW,
        "ttl_s": 60.0,
        "addresses": ("192.0.2.7:7400",),
        "model": "test/tiny",
        "family": "llama",
        "digest": DIGEST,
        "model_layers": 18,
        "hidden_size": 640,
        "layers": "0:6",
        "t_curve_ms": ((1, 10.0), (8, 24.0)),
        "kv_tokens": 1000,
        "kv_free_tokens": 600,
        "codecs": ("fp32", "bf16", "int8"),
        "engine_class": "torch-bf16",
        "version": "0.1.0",
        **changes,
    }
    if isinstance(fields["layers"], str):
        fields["layers"] = LayerRange.parse(fields["layers"])
    return NodeRecord(**fields)


def signed(identity: Identity, **changes: Any) -> SignedRecord:
    return sign_record(identity, a_record(identity, **changes))


def withdrawal(identity: Identity, sequence: int, issued_unix_s: float = NOW) -> SignedWithdrawal:
    said = Withdrawal(node_id=identity.node_id, sequence=sequence, issued_unix_s=issued_unix_s, ttl_s=60.0)
    return sign_withdrawal(identity, said)


def signed_as_is(identity: Identity, fields: dict[str, Any], *, context: str = "record/1") -> SignedRecord:
    """What a hostile node signs: any fields at all, its own checks left out."""
    text = msgspec.json.encode(fields)
    return SignedRecord(text, identity.sign(text, context=context))

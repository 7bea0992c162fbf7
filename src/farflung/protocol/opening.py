"""Opening a session: what the owner signs, and what a stage checks before it believes it (DESIGN.md, rules 4 and 7)."""

from __future__ import annotations

import msgspec

from farflung.core.errors import DigestMismatch, FarflungError, MalformedFrame, ProtocolViolation, SessionRefused
from farflung.core.ids import NodeId, parse_model_digest, parse_node_id, parse_session_id, short
from farflung.core.messages import OpenText
from farflung.core.model import LayerRange, ModelSpec

OPEN_CONTEXT = "open/1"
"""Domain of the owner's signature over an ``OpenText``."""

MAX_OPEN_BYTES = 16 * 1024
OPENING_VALID_S = 300.0
"""An opening expires this long after it was signed."""

CLOCK_SKEW_S = 300.0
"""How far apart the wall clocks of two machines may be."""

_decoder = msgspec.msgpack.Decoder(OpenText)


def encode_open_text(text: OpenText) -> bytes:
    return msgspec.msgpack.encode(text)


def decode_open_text(text: bytes) -> OpenText:
    """Raises MalformedFrame."""
    if len(text) > MAX_OPEN_BYTES:
        raise MalformedFrame(f"an opening of {len(text)} bytes is over the limit of {MAX_OPEN_BYTES}")
    try:
        opened = _decoder.decode(text)
        parse_session_id(opened.session)
        parse_node_id(opened.owner)
        parse_model_digest(opened.digest)
    except (msgspec.MsgspecError, FarflungError) as error:
        raise MalformedFrame(f"an opening does not decode: {error}") from error
    return opened


def check_open(
    text: OpenText, *, me: NodeId, spec: ModelSpec, layers: LayerRange, codecs: frozenset[str], now_unix_s: float
) -> int:
    """The receiver's place in the route.

    Args:
        me, spec, layers, codecs: the receiving stage.
        now_unix_s: its wall clock.

    Raises:
        ProtocolViolation: this stage is not on the route, or with other layers.
        DigestMismatch: another model is meant.
        SessionRefused: void by its expiry, an unknown codec, a lease out of range.
    """
    if text.digest != spec.digest:
        raise DigestMismatch(
            f"node {short(me)} serves model {short(spec.digest)} ({spec.name}), the session wants {short(text.digest)}",
            hint="the weight files differ: compare `farflung models inspect MODEL` on both machines",
        )
    if text.route.layers != spec.layers:
        raise ProtocolViolation(f"the route ends at layer {text.route.layers}, the model has {spec.layers}")
    index = next((i for i, hop in enumerate(text.route.hops) if hop.node_id == me), None)
    if index is None:
        raise ProtocolViolation(f"node {short(me)} is not on the route of session {short(text.session)}")
    if text.route.hops[index].layers != layers:
        raise ProtocolViolation(
            f"the route wants layers {text.route.hops[index].layers} of node {short(me)}, which serves {layers}"
        )
    if not now_unix_s <= text.expires_unix_s <= now_unix_s + OPENING_VALID_S + CLOCK_SKEW_S:
        raise SessionRefused(
            f"the opening of session {short(text.session)} expires {text.expires_unix_s - now_unix_s:+.0f} s from now",
            hint="compare the clocks of the two machines",
        )
    if text.codec not in codecs:
        raise SessionRefused(
            f"node {short(me)} does not speak codec {text.codec[:40]!r}", hint=f"it speaks {', '.join(sorted(codecs))}"
        )
    if not 1 <= text.lease_tokens <= spec.context_tokens + 1024:
        raise SessionRefused(
            f"a lease of {text.lease_tokens} tokens is out of range for a context of {spec.context_tokens}",
            hint="ask for prompt + max_tokens",
        )
    return index

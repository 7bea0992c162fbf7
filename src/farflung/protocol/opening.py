"""Opening a session: what the owner signs, and what a stage checks before it believes it (DESIGN.md, rules 4 and 7)."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from farflung.core.errors import DigestMismatch, FarflungError, MalformedFrame, ProtocolViolation, SessionRefused
from farflung.core.ids import NodeId, parse_model_digest, parse_node_id, parse_session_id, short
from farflung.core.messages import OpenText
from farflung.core.model import LayerRange, ModelSpec
from farflung.protocol.limits import MAX_ALIVE_SLOTS, MAX_LEASE_S

OPEN_CONTEXT = "open/1"
"""Domain of the owner's signature over an ``OpenText``."""

MAX_OPEN_BYTES = 32 * 1024
OPENING_VALID_S = 300.0
"""An opening expires this long after it was signed."""

LEASE_S = 60.0
"""What drivers ask for: a stage waits that long for a sign of a driver that may be gone. They renew it in a third of it."""

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
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, FarflungError) as error:
        raise MalformedFrame(f"an opening does not decode: {error}") from error
    return opened


def check_open(text: OpenText, codec: str, *, me: NodeId, spec: ModelSpec, layers: LayerRange, codecs: frozenset[str]) -> int:
    """The receiver's place in the route.

    Args:
        codec: of the edge, as its bringer chose it.
        me, spec, layers, codecs: the receiving stage.

    Raises:
        ProtocolViolation: this stage is not on the route, or with other layers; a codec that the owner does not allow.
        DigestMismatch: another model is meant.
        SessionRefused: an unknown codec, a lease out of range.
    """
    if text.digest != spec.digest:
        raise DigestMismatch(
            f"node {short(me)} serves model {short(spec.digest)} ({spec.name}), the session wants {short(text.digest)}",
            hint="the weight files differ: compare `farflung models inspect MODEL` on both machines",
        )
    if text.route.layers != spec.layers:
        raise ProtocolViolation(f"the route ends at layer {text.route.layers}, the model has {spec.layers}")
    index = text.route.index_of(me)
    if index is None:
        raise ProtocolViolation(f"node {short(me)} is not on the route of session {short(text.session)}")
    if text.route.hops[index].layers != layers:
        raise ProtocolViolation(
            f"the route wants layers {text.route.hops[index].layers} of node {short(me)}, which serves {layers}"
        )
    if codecs.isdisjoint(text.codecs):
        raise SessionRefused(
            f"node {short(me)} speaks none of the codecs {', '.join(text.codecs)[:80]!r}",
            hint=f"it speaks {', '.join(sorted(codecs))}",
        )
    if index > 0:
        if codec not in text.codecs:
            raise ProtocolViolation(f"codec {codec[:40]!r} of the edge is none that the owner of the session allows")
        if codec not in codecs:
            raise SessionRefused(
                f"node {short(me)} does not speak codec {codec!r}", hint=f"it speaks {', '.join(sorted(codecs))}"
            )
    if not 1.0 <= text.lease_s <= MAX_LEASE_S:
        raise SessionRefused(
            f"a lease of {text.lease_s:.0f} s without a sign of the owner is out of range", hint=f"1 to {MAX_LEASE_S:.0f} s"
        )
    if text.prompt_tokens < 1 or text.max_tokens < 1 or text.prompt_tokens + text.max_tokens > text.lease_tokens:
        raise SessionRefused(
            f"{text.prompt_tokens} prompt tokens and {text.max_tokens} more do not fit a lease of {text.lease_tokens}",
            hint="ask for prompt + max_tokens + slots in flight",
        )
    if not 1 <= text.lease_tokens <= spec.context_tokens + MAX_ALIVE_SLOTS:
        raise SessionRefused(
            f"a lease of {text.lease_tokens} tokens is out of range for a context of {spec.context_tokens}",
            hint="ask for prompt + max_tokens",
        )
    return index


def check_expiry(text: OpenText, now_unix_s: float) -> None:
    """For an opening that begins a session here: an old one may not be brought again. Raises SessionRefused."""
    if not now_unix_s <= text.expires_unix_s <= now_unix_s + OPENING_VALID_S + CLOCK_SKEW_S:
        raise SessionRefused(
            f"the opening of session {short(text.session)} expires {text.expires_unix_s - now_unix_s:+.0f} s from now",
            hint="compare the clocks of the two machines",
        )


def check_newer(text: OpenText, known: OpenText) -> None:
    """A text for a session that is open already: the same session, about another route. Raises ProtocolViolation."""
    if replace(text, route=known.route, expires_unix_s=known.expires_unix_s, proof=known.proof) != known:
        raise ProtocolViolation(f"a later opening of session {short(text.session)} changes more than its route")
    if text.route.epoch == known.route.epoch and text.route != known.route:
        raise ProtocolViolation(f"two openings of session {short(text.session)} give different routes for one epoch")

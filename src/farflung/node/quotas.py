"""How much of a node one owner, and one peer, may take. Pure: ``node.table`` counts and asks, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from farflung.core.errors import SessionRefused
from farflung.core.ids import NodeId, SessionId, short

STRANGERS_KV_SHARE = 0.5
"""Of a node that is open to anyone: one owner leaves half of it to the others. Members of a private swarm and listed drivers
are trusted with all of it."""


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """What is allowed. An *owner* is the key that signed openings, a *peer* the key at the other end of a link.

    Attributes:
        sessions: open at a time, in all.
        sessions_per_owner: of one driver.
        kv_share_per_owner: of the node's KV, in leases of one driver.
        waiting: owners' lines whose session has not been opened yet, in all.
        waiting_per_peer: of one driver.
    """

    sessions: int = 256
    sessions_per_owner: int = 64
    kv_share_per_owner: float = 1.0
    waiting: int = 1024
    waiting_per_peer: int = 256


@dataclass(frozen=True)
class Usage:
    """What sessions take now: of one owner, or of all."""

    sessions: int = 0
    kv_tokens: int = 0


@dataclass(frozen=True)
class Asked:
    """One more session: whose it is and the KV it wants."""

    session: SessionId
    owner: NodeId
    kv_tokens: int


def check_session(quotas: Quotas, asked: Asked, *, of_owner: Usage, of_all: Usage, kv_tokens: int) -> None:
    """Returns if the node may open it; raises SessionRefused with the numbers.

    Args:
        of_owner: what the same owner's sessions take here.
        of_all: what all take.
        kv_tokens: of the node, free or not. What is free is for the pool to say.
    """
    who = short(asked.owner)
    if of_all.sessions >= quotas.sessions:
        raise SessionRefused(f"{of_all.sessions} sessions are open here, the limit", hint="choose another route, or wait")
    if of_owner.sessions >= quotas.sessions_per_owner:
        raise SessionRefused(
            f"driver {who} has {of_owner.sessions} sessions open here, the limit for one", hint="close some first"
        )
    share = int(quotas.kv_share_per_owner * kv_tokens)
    if share < kv_tokens and of_owner.kv_tokens + asked.kv_tokens > share:
        raise SessionRefused(
            f"driver {who} holds {of_owner.kv_tokens} tokens of KV here and asks for {asked.kv_tokens} more: "
            f"one driver may hold {share} of {kv_tokens}",
            hint="ask for fewer tokens, close a session, or choose another route",
        )


def check_waiting(quotas: Quotas, peer: NodeId, *, of_peer: int, of_all: int) -> None:
    """Returns if one more owner's line may wait for its session; raises SessionRefused with the numbers."""
    if of_peer >= quotas.waiting_per_peer:
        raise SessionRefused(f"driver {short(peer)} has {of_peer} lines waiting for their session here, the limit for one")
    if of_all >= quotas.waiting:
        raise SessionRefused(f"{of_all} lines wait for their session here, the limit", hint="choose another route, or wait")

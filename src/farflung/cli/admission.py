"""Who is let in, as the command line and the configuration say it: ``--swarm-key``, ``--allow``, ``--open-to-anyone``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farflung.core.errors import IdentityError, UsageError

if TYPE_CHECKING:
    from farflung.identity.swarm_key import SwarmKey
    from farflung.node.admission import Admission
    from farflung.node.quotas import Quotas

SwarmKeyOption = Annotated[
    str,
    typer.Option(
        "--swarm-key",
        metavar="FILE",
        help="Key of a private swarm ('farflung key new FILE'); FARFLUNG_SWARM_KEY may also hold the key itself.",
    ),
]
Allow = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="ID|FILE", help="A driver to serve, or a file of them, read again on SIGHUP; repeatable."),
]
OpenToAnyone = Annotated[bool, typer.Option("--open-to-anyone", help="Serve whoever can reach --listen, within quotas.")]
IdentityFile = Annotated[
    Path | None,
    typer.Option("--identity", metavar="FILE", help="Key to be known by to nodes with a list; a new one each time by default."),
]

_LONGEST_NAME = 40
"""What is longer and has neither dot nor slash may be a key with a typo, and is not printed."""


def read_swarm_key(value: str) -> SwarmKey | None:
    """The key that ``--swarm-key`` names, None where it is empty. Raises IdentityError."""
    from farflung.identity.swarm_key import SwarmKey

    value = value.strip()
    if not value:
        return None
    if SwarmKey.looks_like_one(value):
        return SwarmKey.parse(value)
    if len(value) > _LONGEST_NAME and not any(sign in value for sign in "./\\"):
        raise IdentityError(
            f"the swarm key is neither a file nor a key ({len(value)} characters)", hint="copy the whole line of the key file"
        )
    return SwarmKey.read(Path(value).expanduser())


def read_admission(swarm_key: str, allow: Sequence[str]) -> Admission:
    """Whom a node lets in. Raises IdentityError, ConfigError, UsageError."""
    from farflung.identity.allow_list import AllowList
    from farflung.node.admission import Admission

    # A variable holds several at once, and perhaps a comma after the last.
    entries = [stripped for listed in allow for entry in listed.split(",") if (stripped := entry.strip())]
    if allow and not entries:  # no list at all would let in more than one that is empty
        raise UsageError("--allow names nobody", hint="give it a node id, or a file of them; or leave it out")
    return Admission(swarm_key=read_swarm_key(swarm_key), drivers=AllowList.read(entries) if allow else None)


def quotas_for(admission: Admission, addresses: Sequence[str], driver_share: float) -> Quotas:
    """A driver may hold ``driver_share`` of the KV; where that is 0, all of it, unless strangers can come."""
    from farflung.node.admission import is_loopback
    from farflung.node.quotas import STRANGERS_KV_SHARE, Quotas

    strangers = admission.is_open_to_anyone and not all(map(is_loopback, addresses))
    return Quotas(kv_share_per_owner=driver_share or (STRANGERS_KV_SHARE if strangers else 1.0))


def describe(admission: Admission, addresses: Sequence[str]) -> str:
    """Whom a node serves, in words."""
    from farflung.node.admission import is_loopback

    if admission.is_open_to_anyone:
        return "anyone on this machine" if all(map(is_loopback, addresses)) else "anyone who can reach it"
    parts = []
    if admission.swarm_key is not None:
        parts.append(f"who has swarm key {admission.swarm_key.fingerprint}")
    if admission.drivers is not None:
        parts.append(f"{len(admission.drivers.node_ids)} listed drivers")
    return ", of them ".join(parts)

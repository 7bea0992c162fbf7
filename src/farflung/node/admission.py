"""Whose sessions a node takes. Pure: the table of sessions asks, and refuses.

Links are judged before (``identity.swarm_key.check_link_proof``): that says which *machines* are let in. This says which
*owners*, because an opening may come through other stages, and its owner's own line later or never.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from farflung.core.errors import UsageError
from farflung.core.ids import NodeId
from farflung.core.messages import OpenText
from farflung.identity.allow_list import AllowList
from farflung.identity.swarm_key import SwarmKey
from farflung.transport.address import parse_address


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What an owner must show; what is set must be met, both where both are.

    Attributes:
        swarm_key: the owner must know it.
        drivers: the owner must be on it.
    """

    swarm_key: SwarmKey | None = None
    drivers: AllowList | None = None

    @property
    def is_open_to_anyone(self) -> bool:
        return self.swarm_key is None and self.drivers is None

    def check_open(self, text: OpenText) -> None:
        """Raises NotAdmitted. That the opening has not expired is for ``protocol.opening`` to check."""
        if self.drivers is not None:
            self.drivers.check(text.owner)
        if self.swarm_key is not None:
            self.swarm_key.check_open_proof(text.proof, text.owner, text.session, text.expires_unix_s)

    def check_owner_line(self, owner: NodeId) -> None:
        """For an owner's own line to a session that is not open yet. Its link has shown the key. Raises NotAdmitted."""
        if self.drivers is not None:
            self.drivers.check(owner)


def check_exposure(addresses: Iterable[str], admission: Admission, *, open_to_anyone: bool) -> None:
    """A node that strangers can reach must say whom it serves.

    Args:
        addresses: where it listens and what it announces.
        admission: who is let in.
        open_to_anyone: its operator wants to serve whoever comes.

    Raises UsageError: nothing says who is let in, or that and ``open_to_anyone`` contradict each other.
    """
    if open_to_anyone and not admission.is_open_to_anyone:
        raise UsageError(
            "a node is open to anyone or has a swarm key or a list of drivers, not both", hint="leave out --open-to-anyone"
        )
    reachable = [address for address in addresses if not is_loopback(address)]
    if reachable and admission.is_open_to_anyone and not open_to_anyone:
        raise UsageError(
            f"strangers may reach {reachable[0]}, and nothing says whose sessions this node takes",
            hint="farflung key new swarm.key, copy that file to every machine of the swarm and add --swarm-key swarm.key; "
            "or --allow ID for each driver; or --open-to-anyone",
        )


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches ``host:port``. Names other than localhost are not looked up and count as no."""
    host, _ = parse_address(address)
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False

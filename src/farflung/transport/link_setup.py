"""What all links of one node share."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from farflung.core.ids import NodeId
from farflung.core.messages import Hello
from farflung.identity.swarm_key import SwarmKey, check_link_proof, link_proof
from farflung.transport.half_received import HalfReceived
from farflung.transport.hello import check_versions
from farflung.transport.link import LinkConfig
from farflung.transport.rates import Rates
from farflung.transport.uplink import Uplink


@dataclass(frozen=True)
class LinkSetup:
    """Made by ``of``.

    Attributes:
        me: this node.
        config: limits and rhythms.
        hello: what this node speaks.
        swarm_key: of the private swarm it is in: peers without it are turned away.
        uplink: by which all of them send.
        half_received: budget of all of them.
        openings: how often each address may open sessions.
        idle_frames: how often it may send what is of no use.
    """

    me: NodeId
    config: LinkConfig
    hello: Hello
    swarm_key: SwarmKey | None
    uplink: Uplink
    half_received: HalfReceived
    openings: Rates
    idle_frames: Rates

    @classmethod
    def of(cls, me: NodeId, config: LinkConfig, hello: Hello, swarm_key: SwarmKey | None) -> LinkSetup:
        uplink, half_received = Uplink(config.max_queued_bytes_in_all), HalfReceived(config.max_partial_bytes)
        openings = Rates(config.openings_burst, config.openings_per_s)
        idle_frames = Rates(config.idle_frames_burst, config.idle_frames_per_s)
        return cls(me, config, hello, swarm_key, uplink, half_received, openings, idle_frames)

    def hello_to(self, peer: NodeId) -> Hello:
        return replace(self.hello, proof=link_proof(self.swarm_key, self.me, peer))

    def check(self, hello: Hello, peer: NodeId) -> None:
        """Raises VersionMismatch, NotAdmitted."""
        check_versions(self.hello, hello, peer)
        check_link_proof(self.swarm_key, hello.proof, self.me, peer)

"""How members of a swarm are connected, and the path that lies between two of them.

The rules are those of the emulator: the round trip between two members is half of each one's, and so is the variance of its
jitter; bytes pass the sender's uplink and then the receiver's downlink. Rates are those of IP; of them a stream of TCP gets
1448 in 1500 bytes, and on some paths only a share, however warm it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from farflung.lab.net.profiles import named_connection
from farflung.transport.memory import LinkShape

_PAYLOAD_SHARE = 1448 / 1500
_MBPS = 1e6 / 8


@dataclass(frozen=True, kw_only=True)
class Access:
    """One member's line to the rest of the world.

    Attributes:
        up_mbps, down_mbps: of IP bytes; 0: unlimited.
        rtt_ms: round trip between two members with this access.
        jitter_ms: standard deviation of that round trip.
        jitter_memory_ms: how long delays stay alike.
        loss_pct: of packets, in each direction between two such members.
        reached_share: the part of the rate that a warm stream really reaches.
    """

    up_mbps: float = 0.0
    down_mbps: float = 0.0
    rtt_ms: float = 0.0
    jitter_ms: float = 0.0
    jitter_memory_ms: float = 20.0
    loss_pct: float = 0.0
    reached_share: float = 1.0

    @property
    def up_bytes_per_s(self) -> float | None:
        """What a stream reaches; None: no limit."""
        return self.up_mbps * _MBPS * _PAYLOAD_SHARE * self.reached_share or None

    @property
    def down_bytes_per_s(self) -> float | None:
        return self.down_mbps * _MBPS * _PAYLOAD_SHARE * self.reached_share or None


REACHED_SHARES = {"intercontinental": 0.18}
"""Where delays wander cubic takes late packets for a full queue: of 100 Mbps at 100 ms with 20 ms of jitter a warm stream that
is kept busy gets 17 to 20 (`farflung lab check`). On the other profiles it gets all of it."""


def profile(name: str) -> Access:
    """The access of an emulated profile, ``fiber`` or ``cable+jittery``. Raises UsageError where there is none of that name."""
    found = named_connection(name)
    return Access(
        up_mbps=found.up_mbps,
        down_mbps=found.down_mbps,
        rtt_ms=found.rtt_ms,
        jitter_ms=found.total_jitter_ms,
        jitter_memory_ms=found.jitter_correlation_ms,
        loss_pct=found.loss_pct,
        reached_share=REACHED_SHARES.get(name.partition("+")[0], 1.0),
    )


def path_shape(sender: Access, receiver: Access) -> LinkShape:
    """Of the path from one member to another, without the sender's uplink, which its paths share."""
    # Of the variance of a round trip each end has a half, and of that each direction a half.
    variance = (sender.jitter_ms**2 + receiver.jitter_ms**2) / 4
    loss = (sender.loss_pct + receiver.loss_pct) / 200
    return LinkShape(
        delay_s=(sender.rtt_ms + receiver.rtt_ms) / 4e3,
        jitter_std_s=math.sqrt(variance) / 1e3,
        jitter_memory_s=max(sender.jitter_memory_ms, receiver.jitter_memory_ms) / 1e3,
        rate_bytes_per_s=receiver.down_bytes_per_s,
        loss=loss,
    )

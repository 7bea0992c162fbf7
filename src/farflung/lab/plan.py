"""From what the lab knows of a swarm to what ``planning.cost`` decides over: the rung below the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from farflung.lab.access import Access, path_shape
from farflung.planning.cost import Curve, Leg, Ring
from farflung.session.chunks import ring_over
from farflung.transport.measure import fragment_bytes_for


def leg_between(sender: Access, receiver: Access) -> Leg:
    """The way from one member to another."""
    shape = path_shape(sender, receiver)
    slowest = min((rate for rate in (sender.up_bytes_per_s, receiver.down_bytes_per_s) if rate), default=None)
    return Leg(
        delay_s=shape.delay_s,
        up_bytes_per_s=sender.up_bytes_per_s,
        down_bytes_per_s=receiver.down_bytes_per_s,
        jitter_std_s=shape.jitter_std_s,
        jitter_memory_s=shape.jitter_memory_s,
        fragment_bytes=fragment_bytes_for(slowest),
    )


def plan_ring(driver: Access, stages: Sequence[tuple[Access, Curve]], *, codec_name: str, hidden_size: int) -> Ring:
    """The ring of a driver and the stages of its route, in order, by the protocol's constants. Raises CodecError."""
    members = [driver, *(access for access, _ in stages), driver]
    legs = [leg_between(sender, receiver) for sender, receiver in pairwise(members)]
    return ring_over([curve for _, curve in stages], legs, codec_name=codec_name, hidden_size=hidden_size)

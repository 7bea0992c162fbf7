"""From what the lab knows of a swarm to what ``planning.cost`` decides over: the rung below the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from farflung.lab.access import Access, path_shape
from farflung.node.scheduling import Pace
from farflung.planning.cost import Curve, Leg, Ring
from farflung.protocol.credit import INITIAL_CREDIT_BYTES, RETURN_AT_BYTES, WINDOW_COST_BYTES
from farflung.transport.measure import fragment_bytes_for
from farflung.wire.codec import codec


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
    return Ring(
        stages=tuple(curve for _, curve in stages),
        legs=tuple(leg_between(sender, receiver) for sender, receiver in pairwise(members)),
        row_bytes=codec(codec_name).row_bytes(hidden_size),
        credit_bytes=INITIAL_CREDIT_BYTES,
        credit_lump_bytes=RETURN_AT_BYTES,
        window_cost_bytes=WINDOW_COST_BYTES,
        step_rows=Pace().max_rows,
    )

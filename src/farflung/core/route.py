"""A route: which node computes which layers, in order."""

from __future__ import annotations

from msgspec import Struct

from farflung.core.errors import UsageError
from farflung.core.ids import NodeId
from farflung.core.model import LayerRange

FIRST_EPOCH = 1


class Hop(Struct, frozen=True, array_like=True):
    """One node of a route and the layers it computes there.

    ``epoch`` is that of the opening that put the node here: 1 at first, a greater one for a replacement, and for a node that
    must begin anew (it holds nothing of the session then).
    """

    node_id: NodeId
    layers: LayerRange
    epoch: int = FIRST_EPOCH


class Route(Struct, frozen=True, array_like=True):
    """Hops in the order activations take. Raises UsageError unless the ranges join and no node comes twice."""

    hops: tuple[Hop, ...]

    def __post_init__(self) -> None:
        if not self.hops:
            raise UsageError("a route needs at least one hop")
        if self.hops[0].layers.start != 0:
            raise UsageError(f"a route starts at layer 0, not at {self.hops[0].layers.start}")
        for left, right in zip(self.hops, self.hops[1:], strict=False):
            if left.layers.stop != right.layers.start:
                raise UsageError(f"layers {left.layers} and {right.layers} of a route do not join")
        if len({hop.node_id for hop in self.hops}) != len(self.hops):
            raise UsageError("a node comes twice in one route")
        if any(hop.epoch < FIRST_EPOCH for hop in self.hops):
            raise UsageError(f"epochs begin at {FIRST_EPOCH}")

    @property
    def layers(self) -> int:
        """Number of layers covered."""
        return self.hops[-1].layers.stop

    @property
    def tail(self) -> Hop:
        return self.hops[-1]

    @property
    def epoch(self) -> int:
        """Of the newest hop: every repair raises it."""
        return max(hop.epoch for hop in self.hops)

    def edge_epoch(self, index: int) -> int:
        """Epoch of the edge into the hop at ``index``: a repair of a stage touches the edges into it and out of it only."""
        return max(hop.epoch for hop in self.hops[max(0, index - 1) : index + 1])

    def index_of(self, node_id: NodeId) -> int | None:
        """Place of the node in the route, None where it has none."""
        return next((index for index, hop in enumerate(self.hops) if hop.node_id == node_id), None)

    def hop_of(self, node_id: NodeId) -> Hop | None:
        """The hop at that node, None where it has none."""
        return next((hop for hop in self.hops if hop.node_id == node_id), None)

    def predecessor(self, index: int) -> Hop | None:
        """The hop before the one at ``index``; None before the first, which the driver feeds itself."""
        return self.hops[index - 1] if index > 0 else None

    def successor(self, index: int) -> Hop | None:
        """The hop after the one at ``index``; None after the tail."""
        return self.hops[index + 1] if index + 1 < len(self.hops) else None

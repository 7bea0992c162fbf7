"""A route: which node computes which layers, in order."""

from __future__ import annotations

from msgspec import Struct

from farflung.core.errors import UsageError
from farflung.core.ids import NodeId
from farflung.core.model import LayerRange


class Hop(Struct, frozen=True, array_like=True):
    """One node of a route and the layers it computes there."""

    node_id: NodeId
    layers: LayerRange


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

    @property
    def layers(self) -> int:
        """Number of layers covered."""
        return self.hops[-1].layers.stop

    @property
    def tail(self) -> Hop:
        return self.hops[-1]

    def index_of(self, node_id: NodeId) -> int:
        """Place of the node in the route. Raises UsageError where it has none."""
        for index, hop in enumerate(self.hops):
            if hop.node_id == node_id:
                return index
        raise UsageError(f"node {node_id} is not on the route")

    def successor(self, index: int) -> Hop | None:
        """The hop after the one at ``index``; None after the tail."""
        return self.hops[index + 1] if index + 1 < len(self.hops) else None

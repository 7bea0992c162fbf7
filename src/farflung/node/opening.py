"""A checked opening at one stage: the owner's text, the message as it came, and this stage's place in the route."""

from __future__ import annotations

from dataclasses import dataclass

from farflung.core.ids import NodeId, SessionId
from farflung.core.messages import Open, OpenText
from farflung.core.route import Hop


def key_of(session: SessionId, owner: NodeId) -> SessionId:
    """What a node calls a session: nobody takes another owner's name away, though every stage knows it."""
    return SessionId(session + owner)


@dataclass(frozen=True)
class Opening:
    """Attributes:
    text: what the owner signed.
    message: as it came; it travels on unchanged but for the codec of the next edge.
    index: this stage's place.
    """

    text: OpenText
    message: Open
    index: int

    @property
    def hop(self) -> Hop:
        """This stage's."""
        return self.text.route.hops[self.index]

    @property
    def successor(self) -> Hop | None:
        return self.text.route.successor(self.index)

    @property
    def predecessor_id(self) -> NodeId:
        """Who brings windows: the stage before, or the owner."""
        hop = self.text.route.predecessor(self.index)
        return self.text.owner if hop is None else hop.node_id

    @property
    def epoch_in(self) -> int:
        """Of the edge from the predecessor."""
        return self.text.route.edge_epoch(self.index)

    @property
    def epoch_out(self) -> int | None:
        """Of the edge to the successor; None at the tail."""
        return None if self.successor is None else self.text.route.edge_epoch(self.index + 1)

"""Errors as they travel to another process."""

from __future__ import annotations

from farflung.core.errors import FarflungError, ProtocolViolation
from farflung.core.ids import NodeId, short
from farflung.core.messages import Fault, Message
from farflung.transport.lines import Line

_MOST = 2000
"""Characters of a message or hint."""


def fault_of(error: FarflungError, node_id: NodeId) -> Fault:
    """``node_id``: the stage at fault."""
    return Fault(node_id, error.code, error.message[:_MOST], error.hint[:_MOST])


def no_place(message: Message, line: Line) -> ProtocolViolation:
    """A peer said what nobody may say there."""
    return ProtocolViolation(f"a {type(message).__name__} from node {short(line.peer)} has no place on this line")

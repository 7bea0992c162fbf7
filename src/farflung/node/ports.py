"""What a session needs of its node."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Protocol

from farflung.core.ids import NodeId, SessionId
from farflung.core.messages import Fault, Open
from farflung.node.row_log import OnEvicted, RowLog
from farflung.swarm.reconnect import ReconnectConfig
from farflung.transport.lines import LinkPool

if TYPE_CHECKING:
    from farflung.node.stage_session import StageSession


class SessionHost(Protocol):
    """Implemented by ``node.table``."""

    @property
    def node_id(self) -> NodeId: ...

    @property
    def pool(self) -> LinkPool: ...

    @property
    def random(self) -> Random: ...

    @property
    def reconnect(self) -> ReconnectConfig: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def context_tokens(self) -> int: ...

    @property
    def max_slots(self) -> int: ...

    def open_log(self, session: SessionId, on_evicted: OnEvicted) -> RowLog: ...

    def ready(self, session: StageSession) -> None:
        """It has a window to compute."""

    def connect(self, session: StageSession) -> None:
        """Run ``session.connect`` in a task."""

    def reopen(self, session: StageSession, message: Open) -> None:
        """The owner sent another opening for it. Raises where it is not good."""

    def ended(self, session: StageSession, fault: Fault | None) -> None:
        """It is over: free its KV, remember its end."""

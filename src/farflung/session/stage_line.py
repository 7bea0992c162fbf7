"""The driver's line to one stage, with what it needs to remember about it."""

from __future__ import annotations

from dataclasses import dataclass

from farflung.core.messages import Report
from farflung.transport.lines import Line


@dataclass
class StageLine:
    """Attributes:
    line: to the stage; None while there is none.
    bytes_sent, bytes_received: over the links of its lines so far, TLS included, heartbeats apart; the line in use comes on
        top when it is let go. Other lines of these links count too.
    report: the stage's last word, once it is here.
    granted: it has said over this line how many slots may be in flight: the session is open there.
    complete_from: the stage's log has all rows from that position on.
    """

    line: Line | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    report: Report | None = None
    granted: bool = False
    complete_from: int = 0

    def take(self, line: Line) -> None:
        """A line that is up."""
        self.line, self.granted = line, False
        sent, received = _carried(line)
        self.bytes_sent -= sent
        self.bytes_received -= received

    def let_go(self) -> None:
        """Releases the line, if there is one."""
        if self.line is None:
            return
        sent, received = _carried(self.line)
        self.bytes_sent += sent
        self.bytes_received += received
        self.line.release()
        self.line = None


def _carried(line: Line) -> tuple[int, int]:
    stats = line.link.stats
    return (
        stats.bytes_sent - stats.housekeeping_bytes_sent,
        stats.bytes_received - stats.housekeeping_bytes_received,
    )

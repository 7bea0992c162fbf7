"""The driver's line to one stage, with what it needs to remember about it."""

from __future__ import annotations

from dataclasses import dataclass

from farflung.core.messages import Report
from farflung.transport.lines import Line


@dataclass
class StageLine:
    """Attributes:
    line: to the stage.
    sent_before, received_before: what its link had carried when the line was taken.
    report: the stage's last word, once it is here.
    """

    line: Line
    sent_before: int
    received_before: int
    report: Report | None = None

    @classmethod
    def over(cls, line: Line) -> StageLine:
        return cls(line, *_carried(line))

    def carried(self) -> tuple[int, int]:
        """Bytes sent and received over the link since, TLS included, heartbeats apart. Other lines of it count too."""
        sent, received = _carried(self.line)
        return sent - self.sent_before, received - self.received_before


def _carried(line: Line) -> tuple[int, int]:
    stats = line.link.stats
    return (
        stats.bytes_sent - stats.housekeeping_bytes_sent,
        stats.bytes_received - stats.housekeeping_bytes_received,
    )

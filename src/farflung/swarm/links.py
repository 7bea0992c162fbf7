"""Links between nodes as the nodes measured them: one signed report per node, replaced by its next one.

Only nodes that are in the directory report, at most ``MAX_LINKS`` links each, so the table is bounded by the nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from msgspec import Struct

from farflung.core.errors import FarflungError, RecordRefused
from farflung.core.ids import NodeId, parse_node_id, short
from farflung.identity.keys import Identity
from farflung.swarm.signed import SignedText, Statement, open_statement, sign_statement

LINKS_CONTEXT = "links/1"
MAX_LINKS = 64
"""A node measures its neighbours and a sample of the others (at 1,000 nodes nothing is quadratic)."""


class SignedLinks(SignedText, frozen=True):
    """A ``LinkReport`` under its node's key."""


class LinkTo(Struct, frozen=True, array_like=True):
    """A link from the reporting node.

    Attributes:
        node_id: the other end.
        round_trip_s: measured round trip, seconds.
        bytes_per_s: rate at which the other end saw bulk arrive; 0 not measured.
    """

    node_id: NodeId
    round_trip_s: float
    bytes_per_s: float = 0.0


class LinkReport(Statement, frozen=True, kw_only=True):
    """All links a node wants known; replaces its report before."""

    links: tuple[LinkTo, ...]


@dataclass(frozen=True)
class MeasuredLink:
    """A row of the link table; ``source`` is the node that measured."""

    source: NodeId
    target: NodeId
    round_trip_s: float
    bytes_per_s: float


def sign_links(identity: Identity, report: LinkReport) -> SignedLinks:
    """Raises RecordRefused where it names another node than ``identity`` or others would refuse what it says."""
    _check(report)
    signed = sign_statement(identity, report, context=LINKS_CONTEXT)
    return SignedLinks(signed.text, signed.signature)


def open_links(signed: SignedText, now_unix_s: float) -> LinkReport:
    """Raises RecordRefused, BadSignature (see ``open_statement``)."""
    report = open_statement(signed, LinkReport, context=LINKS_CONTEXT, now_unix_s=now_unix_s)
    _check(report)
    return report


def measured_links(reports: Iterable[LinkReport]) -> list[MeasuredLink]:
    """The rows that ``reports`` stand for."""
    return [
        MeasuredLink(report.node_id, link.node_id, link.round_trip_s, link.bytes_per_s)
        for report in reports
        for link in report.links
    ]


def _check(report: LinkReport) -> None:
    who = f"the link report of node {short(report.node_id)}"
    if len(report.links) > MAX_LINKS or len({link.node_id for link in report.links}) != len(report.links):
        raise RecordRefused(f"{who} has {len(report.links)} links; at most {MAX_LINKS} are allowed, one per node")
    for link in report.links:
        try:
            parse_node_id(link.node_id)
        except FarflungError as error:
            raise RecordRefused(f"{who} is refused: {error.message}") from error
        if link.node_id == report.node_id:
            raise RecordRefused(f"{who} has a link to itself")
        if not (0 <= link.round_trip_s <= 60 and math.isfinite(link.bytes_per_s) and link.bytes_per_s >= 0):
            raise RecordRefused(f"{who} has a link of {link.round_trip_s} s and {link.bytes_per_s} bytes/s")


@dataclass(frozen=True)
class _Entry:
    signed: SignedLinks
    report: LinkReport
    expires_s: float


class LinkTable:
    """The newest report of each node, until it expires. Times are those of one monotonic clock, passed in."""

    def __init__(self) -> None:
        self._entries: dict[NodeId, _Entry] = {}

    def put(self, signed: SignedLinks, report: LinkReport, now_s: float) -> None:
        """Raises RecordRefused where a report as new as this one is known."""
        known = self._entries.get(report.node_id)
        if known is not None and known.report.sequence >= report.sequence:
            raise RecordRefused(
                f"link report {report.sequence} of node {short(report.node_id)} is not newer than {known.report.sequence}"
            )
        self._entries[report.node_id] = _Entry(signed, report, now_s + report.ttl_s)

    def drop(self, node_id: NodeId) -> None:
        """Forgets what the node measured, if anything."""
        self._entries.pop(node_id, None)

    def live(self, now_s: float) -> list[tuple[SignedLinks, LinkReport]]:
        """Reports that have not expired; expired ones are forgotten."""
        self._entries = {node_id: entry for node_id, entry in self._entries.items() if entry.expires_s > now_s}
        return [(entry.signed, entry.report) for entry in self._entries.values()]

"""The directory over HTTP: paths and bodies that server and client agree on. JSON; bytes are base64 (RFC 4648, padded).

    POST /v1/records       {text, signature}        204     a node's record, see ``records``
    POST /v1/withdrawals   {text, signature}        204     it leaves
    POST /v1/links         {text, signature}        204     what it measured, see ``links``
    GET  /v1/records       ?model= &beside=A:B      200     {records: [{text, signature}]}
    GET  /v1/watch         ... &cursor= &wait_s=    200     {cursor, snapshot, records, gone: [node id]}
    GET  /v1/links                                  200     {reports: [{text, signature}]}
    GET  /v1/health                                 200     {nodes, version}

``watch`` answers as soon as something changed after ``cursor`` (empty: at once, with everything), else empty after
``wait_s``; the answer carries the next cursor. A long poll and not a stream of events: it needs nothing of proxies, and
what a slow watcher missed arrives as one answer of the present state. Refusals are 4xx or 503 with {code, message, hint}.
"""

from __future__ import annotations

from http import HTTPStatus

from msgspec import Struct

from farflung.core.errors import (
    BadSignature,
    DirectoryError,
    DirectoryUnreachable,
    FarflungError,
    FrameTooLarge,
    RecordRefused,
    UsageError,
)
from farflung.core.ids import NodeId
from farflung.swarm.signed import MAX_TEXT_BYTES, SignedText

RECORDS = "/v1/records"
WITHDRAWALS = "/v1/withdrawals"
WATCH = "/v1/watch"
LINKS = "/v1/links"
HEALTH = "/v1/health"

MAX_POST_BYTES = 2 * MAX_TEXT_BYTES
"""Room for a text in base64 (4/3) and its signature; more is refused before it is read."""


class RecordsBody(Struct, frozen=True):
    """Answer of ``GET /v1/records``."""

    records: tuple[SignedText, ...]


class WatchBody(Struct, frozen=True):
    """Answer of ``GET /v1/watch``; see ``table.Batch``."""

    cursor: str
    snapshot: bool
    records: tuple[SignedText, ...]
    gone: tuple[NodeId, ...]


class LinksBody(Struct, frozen=True):
    """Answer of ``GET /v1/links``."""

    reports: tuple[SignedText, ...]


class HealthBody(Struct, frozen=True):
    """Answer of ``GET /v1/health``."""

    nodes: int
    version: str


class ErrorBody(Struct, frozen=True):
    """An error of ``core.errors``, by its code."""

    code: str
    message: str
    hint: str = ""


_STATUS: tuple[tuple[type[FarflungError], HTTPStatus], ...] = (
    (BadSignature, HTTPStatus.FORBIDDEN),
    (RecordRefused, HTTPStatus.CONFLICT),
    (FrameTooLarge, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (DirectoryUnreachable, HTTPStatus.SERVICE_UNAVAILABLE),
    (DirectoryError, HTTPStatus.SERVICE_UNAVAILABLE),
    (UsageError, HTTPStatus.BAD_REQUEST),
)


def status_of(error: FarflungError) -> HTTPStatus:
    """The status an error is told with."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), HTTPStatus.BAD_REQUEST)

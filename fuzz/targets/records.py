"""What arrives at a directory, and from one: the first byte chooses the way in, the rest is what a stranger sent.

0, 1, 2  the text of a record, a withdrawal, a link report, signed by a node that says whatever it likes
3        the body of a POST, second byte: which path
4        the query of a GET, second byte: which path
5        the body of an answer, read by a client; second byte: to which request
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from contextlib import suppress
from functools import cache
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from farflung.core.errors import FarflungError, error_from_code
from farflung.identity.keys import Identity
from farflung.swarm import http_api as api
from farflung.swarm.http_app import directory_app
from farflung.swarm.links import LINKS_CONTEXT, open_links
from farflung.swarm.records import RECORD_CONTEXT, WITHDRAWAL_CONTEXT, open_record, open_withdrawal
from farflung.swarm.service import DirectoryService, ServiceConfig
from farflung.swarm.signed import MAX_TEXT_BYTES, SignedText
from fuzz.targets.promises import promise

RECORD, WITHDRAWAL, LINK_REPORT, POST, GET, ANSWER = range(6)
POSTS = (api.RECORDS, api.WITHDRAWALS, api.LINKS)
GETS = (api.RECORDS, api.WATCH, api.LINKS, api.HEALTH)
ANSWERS = (api.RecordsBody, api.WatchBody, api.LinksBody, api.HealthBody, api.ErrorBody)

NOW_UNIX_S = 1_800_000_000.0
STRANGER = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
"""Whose records are fuzzed: always the same, so that an input that breaks something breaks it again."""

_SIGNED = {
    RECORD: (open_record, RECORD_CONTEXT),
    WITHDRAWAL: (open_withdrawal, WITHDRAWAL_CONTEXT),
    LINK_REPORT: (open_links, LINKS_CONTEXT),
}
_ONCE_ONLY_S = 5.0


def records(data: bytes) -> None:
    """Raises PromiseBroken, or whatever the code should not have raised."""
    if len(data) < 2:
        return
    way, which, rest = data[0] % 6, data[1], data[2:]
    with suppress(FarflungError):
        if way in _SIGNED:
            _statement(way, data[1:])
        elif way == POST:
            _told(_request("POST", POSTS[which % len(POSTS)], body=rest))
        elif way == GET:
            _told(_request("GET", GETS[which % len(GETS)], query=rest))
        else:
            _answer(rest, ANSWERS[which % len(ANSWERS)])


def _statement(way: int, text: bytes) -> None:
    opener, context = _SIGNED[way]
    said = opener(SignedText(text, STRANGER.sign(text[: MAX_TEXT_BYTES + 1], context=context)), NOW_UNIX_S)
    promise(said.node_id == STRANGER.node_id, f"{STRANGER.node_id} signed for {said.node_id}")
    again = msgspec.json.decode(msgspec.json.encode(said), type=type(said))
    promise(again == said, f"{said!r} does not survive coding")


def _answer(body: bytes, kind: type[msgspec.Struct]) -> None:
    try:
        answer = msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    if isinstance(answer, api.ErrorBody):
        error = error_from_code(answer.code, answer.message, answer.hint)
        promise((error.message + error.hint).isprintable(), f"{error.message!r} could steer a terminal")
    for signed, opener in _signed_in(answer):
        with suppress(FarflungError):
            opener(signed, NOW_UNIX_S)


def _signed_in(answer: msgspec.Struct) -> list[tuple[SignedText, Any]]:
    if isinstance(answer, api.RecordsBody | api.WatchBody):
        return [(signed, open_record) for signed in answer.records[:4]]
    if isinstance(answer, api.LinksBody):
        return [(signed, open_links) for signed in answer.reports[:4]]
    return []


def _told(answered: tuple[int, bytes]) -> None:
    """The status is one that ``http_api`` knows, and its body says why."""
    status, body = answered
    promise(status < 500 or status == 503, f"status {status}: {body[:300]!r}")
    if status >= 400:
        msgspec.json.decode(body, type=api.ErrorBody)


@cache
def _runner() -> asyncio.Runner:
    """One loop for all inputs: making one takes longer than a request."""
    return asyncio.Runner()


def _request(method: str, path: str, *, query: bytes = b"", body: bytes = b"") -> tuple[int, bytes]:
    """A request to a directory that is empty, as a web server hands it over."""
    return _runner().run(_ask(method, path, query, body))


async def _ask(method: str, path: str, query: bytes, body: bytes) -> tuple[int, bytes]:
    app = directory_app(DirectoryService(ServiceConfig(instance="fuzz"), lambda: NOW_UNIX_S))
    arriving: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    status, answer = 0, bytearray()

    async def receive() -> dict[str, Any]:
        return arriving.pop(0) if arriving else {"type": "http.disconnect"}

    async def send(event: MutableMapping[str, Any]) -> None:
        nonlocal status
        status = event.get("status", status)
        answer.extend(event.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "query_string": query,
        "headers": [(b"content-length", str(len(body)).encode())],
    }
    async with asyncio.timeout(_ONCE_ONLY_S):
        await app(scope, receive, send)
    return status, bytes(answer)

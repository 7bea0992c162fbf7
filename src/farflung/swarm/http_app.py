"""The directory as a Starlette application: decodes requests within bounds, answers with bodies of ``http_api``."""

from __future__ import annotations

import asyncio
import math
from http import HTTPStatus
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from farflung import __version__
from farflung.core.errors import DirectoryError, FarflungError, FrameTooLarge, UsageError
from farflung.core.model import LayerRange
from farflung.swarm import http_api as api
from farflung.swarm.links import SignedLinks
from farflung.swarm.records import Query, SignedRecord, SignedWithdrawal
from farflung.swarm.service import DirectoryService, Page
from farflung.swarm.signed import SignedText

_BODY_TIMEOUT_S = 5.0
_T = TypeVar("_T", bound=SignedText)


def directory_routes(service: DirectoryService) -> list[Route]:
    """The paths of ``http_api``, to mount in any Starlette application that answers FarflungError with ``tell_error``."""

    async def announce(request: Request) -> Response:
        service.announce(await _body(request, SignedRecord))
        return Response(status_code=204)

    async def withdraw(request: Request) -> Response:
        service.withdraw(await _body(request, SignedWithdrawal))
        return Response(status_code=204)

    async def report_links(request: Request) -> Response:
        service.report_links(await _body(request, SignedLinks))
        return Response(status_code=204)

    async def records(request: Request) -> Response:
        return _json(api.RecordsBody(tuple(entry.signed for entry in service.entries(_query(request)))))

    async def watch(request: Request) -> Response:
        page = await _poll(service, request)
        if page is None:
            return Response(status_code=204)  # nobody is there to read it
        batch = page.batch
        return _json(api.WatchBody(page.cursor, batch.snapshot, tuple(entry.signed for entry in batch.entries), batch.gone))

    async def links(_request: Request) -> Response:
        return _json(api.LinksBody(tuple(signed for signed, _ in service.link_reports())))

    async def health(_request: Request) -> Response:
        return _json(api.HealthBody(service.nodes, __version__))

    return [
        Route(api.RECORDS, announce, methods=["POST"]),
        Route(api.WITHDRAWALS, withdraw, methods=["POST"]),
        Route(api.LINKS, report_links, methods=["POST"]),
        Route(api.RECORDS, records, methods=["GET"]),
        Route(api.WATCH, watch, methods=["GET"]),
        Route(api.LINKS, links, methods=["GET"]),
        Route(api.HEALTH, health, methods=["GET"]),
    ]


async def tell_error(_request: Request, error: Exception) -> Response:
    """Starlette exception handler for FarflungError and HTTPException: the body is an ``ErrorBody``."""
    if isinstance(error, FarflungError):
        status = api.status_of(error)
        answer = _json(api.ErrorBody(error.code, error.message, error.hint), status)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            answer.headers["connection"] = "close"  # whoever has to come again holds no place until then
        return answer
    if isinstance(error, HTTPException):
        hint = f"the directory answers {api.RECORDS} and {api.WATCH}"
        return _json(api.ErrorBody(UsageError.code, error.detail, hint), error.status_code)
    raise error


def directory_app(service: DirectoryService) -> Starlette:
    """A whole application for ``service``."""
    return Starlette(
        routes=directory_routes(service), exception_handlers={FarflungError: tell_error, HTTPException: tell_error}
    )


async def _body(request: Request, kind: type[_T]) -> _T:
    """The body, decoded. Raises FrameTooLarge before reading more than the limit, UsageError where it is junk, DirectoryError
    where it does not arrive."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or len(announced) > 9 or int(announced) > api.MAX_POST_BYTES:
        raise _too_large(f"{announced[:20]} bytes")
    content = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for chunk in request.stream():
                content += chunk
                if len(content) > api.MAX_POST_BYTES:
                    raise _too_large("more bytes")
        return msgspec.json.decode(content, type=kind)
    except TimeoutError as error:
        raise DirectoryError(f"the body did not arrive within {_BODY_TIMEOUT_S:g} s") from error
    except ClientDisconnect as error:
        raise DirectoryError("the connection ended before the body did") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"the body is not {{text, signature}} in JSON: {str(error)[:200]}") from error


def _too_large(size: str) -> FrameTooLarge:
    return FrameTooLarge(f"a body of {size} is over the limit of {api.MAX_POST_BYTES} bytes")


def _query(request: Request) -> Query:
    beside = request.query_params.get("beside")
    return Query(model=request.query_params.get("model", ""), beside=LayerRange.parse(beside) if beside else None)


async def _poll(service: DirectoryService, request: Request) -> Page | None:
    """The next page; None where the watcher hangs up first, so that a place among the watchers is free at once."""
    query = _query(request)
    try:
        wait_s = float(request.query_params.get("wait_s", "0"))
    except ValueError:
        wait_s = math.nan
    if not 0 <= wait_s < math.inf:
        raise UsageError(
            f"wait_s={request.query_params['wait_s'][:20]!r} is no time to wait", hint="give seconds, e.g. wait_s=20"
        )
    poll = asyncio.ensure_future(service.poll(query, request.query_params.get("cursor", ""), wait_s))
    hang_up = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({poll, hang_up}, return_when=asyncio.FIRST_COMPLETED)
        return poll.result() if poll.done() else None
    finally:
        poll.cancel()
        hang_up.cancel()
        await asyncio.gather(poll, hang_up, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(body: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")

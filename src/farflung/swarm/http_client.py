"""A directory reached over HTTP (``http_api`` has the paths). Nothing that comes back is believed before its signature is."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

import httpx2
import msgspec
import structlog

from farflung.core.errors import (
    BadSignature,
    DirectoryError,
    DirectoryUnreachable,
    FarflungError,
    RecordRefused,
    UsageError,
    error_from_code,
)
from farflung.core.ids import parse_node_id
from farflung.swarm import http_api as api
from farflung.swarm.backoff import Backoff, BackoffConfig
from farflung.swarm.directory import Change, NodeGone, NodeSeen, Snapshot, Update, follow
from farflung.swarm.links import MeasuredLink, SignedLinks, measured_links, open_links
from farflung.swarm.records import EVERYTHING, NodeRecord, Query, SignedRecord, SignedWithdrawal, open_record
from farflung.swarm.service import WallClock
from farflung.swarm.signed import SignedText, Statement

_log = structlog.get_logger(__name__)

_KEEP_ALIVE_S = 60.0
"""Less than the server's, so that mostly this end closes an idle connection and nothing is sent into one that is closing."""

_MAX_CURSOR = 100
"""It goes back in a URL."""

_B = TypeVar("_B", bound=msgspec.Struct)
_S = TypeVar("_S", bound=Statement)


@dataclass(frozen=True)
class HttpDirectoryConfig:
    """How to talk to a directory.

    Attributes:
        url: ``http://host:port`` or ``https://...``, with a path where it is mounted below one.
        timeout_s: to connect, and of silence, before DirectoryUnreachable; a whole answer may take ten times as long.
        watch_wait_s: a watch asks anew at least this often.
        max_answer_bytes: a longer answer is refused while it is read.
        backoff: of a watch, while the directory is away.
    """

    url: str
    timeout_s: float = 3.0
    watch_wait_s: float = 20.0
    max_answer_bytes: int = 64 * 1024**2
    backoff: BackoffConfig = field(default_factory=BackoffConfig)


class _Closed(Exception):
    """The connection ended before the answer did."""


class HttpDirectory:
    """A client of the directory at ``config.url``. Must be closed (``aclose``), in the loop it was used in.

    Args:
        config: where, and with what patience.
        wall_clock: judges times of issue.
        random: jitter of reconnecting.

    Raises:
        UsageError: the URL is none.
    """

    def __init__(self, config: HttpDirectoryConfig, *, wall_clock: WallClock, random: Random) -> None:
        self._config = config
        self._wall_clock = wall_clock
        self._random = random
        self._client = httpx2.AsyncClient(
            base_url=_checked_url(config.url),
            headers={"accept-encoding": "identity"},  # a few compressed bytes could be a bomb
            timeout=config.timeout_s,
            limits=httpx2.Limits(keepalive_expiry=_KEEP_ALIVE_S),
            # A proxy named in the environment reaches no directory on this machine.
            trust_env=not _is_loopback(config.url),
        )

    @property
    def url(self) -> str:
        return self._config.url

    async def announce(self, signed: SignedRecord) -> None:
        await self._post(api.RECORDS, signed)

    async def withdraw(self, signed: SignedWithdrawal) -> None:
        await self._post(api.WITHDRAWALS, signed)

    async def report_links(self, signed: SignedLinks) -> None:
        await self._post(api.LINKS, signed)

    async def records(self, query: Query = EVERYTHING) -> list[NodeRecord]:
        """See ``Directory``. Raises the refusal where there are records and all are refused: one clock is wrong, mostly."""
        body = await self._get(api.RECORDS, _params(query), api.RecordsBody)
        records, refusals = self._verified(body.records, open_record)
        if refusals and not records:
            raise refusals[0]
        return [record for record in records if query.matches(record)]

    def watch(self, query: Query = EVERYTHING) -> AsyncGenerator[Change, None]:
        async def poll(cursor: str) -> Update:
            params = {**_params(query), "cursor": cursor, "wait_s": f"{self._config.watch_wait_s:g}"}
            body = await self._get(api.WATCH, params, api.WatchBody, wait_s=self._config.watch_wait_s)
            return self._update(body, query)

        return follow(poll, Backoff(self._config.backoff, self._random), self.url)

    async def links(self) -> list[MeasuredLink]:
        body = await self._get(api.LINKS, {}, api.LinksBody)
        return measured_links(self._verified(body.reports, open_links)[0])

    async def aclose(self) -> None:
        await self._client.aclose()

    def _update(self, body: api.WatchBody, query: Query) -> Update:
        if len(body.cursor) > _MAX_CURSOR:
            raise DirectoryError(f"the directory at {self.url} answers nonsense: a cursor of {len(body.cursor)} characters")
        records = [record for record in self._verified(body.records, open_record)[0] if query.matches(record)]
        if body.snapshot:
            return Update(body.cursor, (Snapshot(tuple(records)),))
        try:
            gone = [NodeGone(parse_node_id(node_id)) for node_id in body.gone]
        except UsageError as error:
            raise DirectoryError(f"the directory at {self.url} answers nonsense: {error.message}") from error
        return Update(body.cursor, (*gone, *map(NodeSeen, records)))

    def _verified(
        self, texts: Sequence[SignedText], opener: Callable[[SignedText, float], _S]
    ) -> tuple[list[_S], list[FarflungError]]:
        """Statements that hold, and why others do not."""
        statements: list[_S] = []
        refusals: list[FarflungError] = []
        now_unix_s = self._wall_clock()
        for signed in texts:
            try:
                statements.append(opener(signed, now_unix_s))
            except FarflungError as error:
                refusals.append(error)
        if refusals:
            _log.warning("records refused", directory=self.url, refused=len(refusals), first=refusals[0].message)
        return statements, refusals

    async def _post(self, path: str, signed: SignedText) -> None:
        try:
            await self._request("POST", path, content=msgspec.json.encode(signed))
        except UsageError as error:
            raise RecordRefused(f"the directory at {self.url} did not understand: {error.message}", hint=error.hint) from error

    async def _get(self, path: str, params: Mapping[str, str], kind: type[_B], wait_s: float = 0.0) -> _B:
        content = await self._request("GET", path, params=params, wait_s=wait_s)
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise DirectoryError(
                f"{self.url}{path} answers nonsense: {str(error)[:200]}", hint="is this the URL of a farflung directory?"
            ) from error

    async def _request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        content: bytes | None = None,
        wait_s: float = 0.0,
    ) -> bytes:
        """The body of a successful answer; ``wait_s`` is how long the directory may think first.

        A connection that was closed while it was idle shows only when it is used: then the request is made once more.
        """
        try:
            return await self._try(method, path, params, content, wait_s)
        except _Closed:
            pass
        try:
            return await self._try(method, path, params, content, wait_s)
        except _Closed as error:
            raise self._unreachable(f"closes the connection: {error}") from error

    async def _try(
        self, method: str, path: str, params: Mapping[str, str] | None, content: bytes | None, wait_s: float
    ) -> bytes:
        config = self._config
        timeout = httpx2.Timeout(config.timeout_s, read=config.timeout_s + wait_s)
        try:
            async with (
                asyncio.timeout(10 * config.timeout_s + wait_s),
                self._client.stream(method, path, params=params, content=content, timeout=timeout) as response,
            ):
                body = bytearray()
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > config.max_answer_bytes:
                        raise DirectoryError(f"{self.url}{path} answers more than {config.max_answer_bytes} bytes")
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise self._unreachable(f"gave no answer within {config.timeout_s:g} s") from error
        except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError) as error:
            raise _Closed(str(error)[:200] or type(error).__name__) from error
        except httpx2.HTTPError as error:
            raise self._unreachable(f"cannot be reached: {str(error)[:200] or type(error).__name__}") from error
        if not response.is_success:
            raise self._refusal(response.status_code, bytes(body), posted=method == "POST")
        return bytes(body)

    def _unreachable(self, what: str) -> DirectoryUnreachable:
        return DirectoryUnreachable(
            f"the directory at {self.url} {what}",
            hint=f"is `farflung directory` running at {self.url}, and does the network let this machine through?",
        )

    def _refusal(self, status: int, body: bytes, *, posted: bool) -> FarflungError:
        """What the directory says, as far as it is one to say it: anything else is its fault, and passes maybe."""
        try:
            told = msgspec.json.decode(body, type=api.ErrorBody)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            if status >= 500:
                return self._unreachable(f"failed with status {status}")
            return DirectoryError(
                f"{self.url} answered with status {status} and no reason", hint="is this the URL of a farflung directory?"
            )
        error = error_from_code(told.code, told.message, told.hint)
        if isinstance(error, (DirectoryError, UsageError)) or (posted and isinstance(error, BadSignature)):
            return error
        return DirectoryError(f"{self.url} answered with status {status}: {error.message}", hint=error.hint)


def _params(query: Query) -> dict[str, str]:
    params = {"model": query.model} if query.model else {}
    return params if query.beside is None else {**params, "beside": str(query.beside)}


def _checked_url(text: str) -> httpx2.URL:
    hint = "write http://host:port, e.g. http://127.0.0.1:7700"
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise UsageError(f"{text[:200]!r} is no URL of a directory: {error}", hint=hint) from error
    if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 1) <= 65535:
        raise UsageError(f"{text[:200]!r} is no URL of a directory", hint=hint)
    return url


def _is_loopback(text: str) -> bool:
    host = httpx2.URL(text).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

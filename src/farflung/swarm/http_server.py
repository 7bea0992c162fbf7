"""Serves a directory over HTTP inside the running event loop (``http_api`` has the paths)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType

import uvicorn

from farflung.core.errors import AddressInUse, Unreachable
from farflung.swarm.http_app import directory_app
from farflung.swarm.http_protocol import impatient_protocol
from farflung.swarm.service import DirectoryService, ServiceConfig, WallClock
from farflung.transport.address import format_address, parse_address


@dataclass(frozen=True)
class DirectoryServerConfig:
    """How to serve.

    Attributes:
        listen: ``host:port``; port 0 takes any free one.
        service: limits of the directory.
        request_timeout_s: a connection without a whole request is closed after so long.
        keep_alive_s: one without a next request is; longer than nodes wait between renewals.
    """

    listen: str = "127.0.0.1:0"
    service: ServiceConfig = field(default_factory=ServiceConfig)
    request_timeout_s: float = 5.0
    keep_alive_s: int = 75

    @property
    def max_connections(self) -> int:
        """Beyond it requests are answered with 503: one per watcher, and for all that is short two per node there may be."""
        return self.service.most_watchers + 2 * self.service.table.max_nodes


class DirectoryServer:
    """``async with DirectoryServer(config) as server``: serves from entry to exit, within the running loop.

    Leaves signals alone. On exit watchers are answered and connections closed, within 2 s.

    Args:
        config: where and how much.
        wall_clock: judges times of issue.

    Raises:
        AddressInUse, Unreachable: on entry, where ``listen`` cannot be had.
        UsageError: where it is no address.
    """

    def __init__(self, config: DirectoryServerConfig, wall_clock: WallClock = time.time) -> None:
        self._config = config
        self._service = DirectoryService(config.service, wall_clock)
        self._url = ""

    @property
    def service(self) -> DirectoryService:
        return self._service

    @property
    def url(self) -> str:
        """Where it can be reached from this machine, once entered."""
        return self._url

    async def __aenter__(self) -> DirectoryServer:
        listener = await _bind(self._config.listen)
        host, port = listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - told where to dial, not bound
        self._url = f"http://{format_address(host, port)}"
        self._uvicorn = _Server(
            uvicorn.Config(
                directory_app(self._service),
                log_config=None,
                access_log=False,
                lifespan="off",
                http=impatient_protocol(self._config.request_timeout_s),
                timeout_keep_alive=self._config.keep_alive_s,
                ws="none",
                server_header=False,
                limit_concurrency=self._config.max_connections,
                timeout_graceful_shutdown=1,
            )
        )
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=[listener]), name="directory server")
        ready = asyncio.create_task(self._uvicorn.ready.wait())
        try:
            await asyncio.wait({self._serving, ready}, return_when=asyncio.FIRST_COMPLETED)
            if self._serving.done():
                self._serving.result()
        except BaseException:
            self._serving.cancel()
            listener.close()
            raise
        finally:
            ready.cancel()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._service.close()
        self._uvicorn.should_exit = True
        await self._serving


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, with an event for readiness."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):  # of clients that stopped in the middle of a request
            transport = connection.transport
            if transport is not None:
                transport.abort()


async def _bind(listen: str) -> socket.socket:
    host, port = parse_address(listen)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise Unreachable(
            f"{listen} cannot be listened on: {error.strerror}", hint="name an interface of this machine"
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # there it only skips the wait after a close; on Windows it would share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"{listen} is taken by another process", hint="stop it, or choose another port with --listen (0 takes any)"
            ) from error
        raise Unreachable(
            f"{listen} cannot be listened on: {error.strerror}", hint="name an interface of this machine"
        ) from error
    listener.setblocking(False)
    return listener

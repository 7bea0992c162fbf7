"""``farflung directory``: the directory alone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from random import Random
from typing import TYPE_CHECKING, Annotated

import typer

from farflung.cli.admission import SwarmKeyOption, read_swarm_key
from farflung.cli.options import DEFAULT_DIRECTORY, Debug, ExitWithStdin, Json, State, examples
from farflung.cli.output import Output, command
from farflung.cli.stopping import ParentWatch, stop_requests

if TYPE_CHECKING:
    from farflung.identity.swarm_key import SwarmKey
    from farflung.swarm.directory import Directory

app = typer.Typer()

DEFAULT_LISTEN = DEFAULT_DIRECTORY.removeprefix("http://")


@app.command(
    epilog=examples(
        "farflung directory",
        "farflung directory --listen 0.0.0.0:7700      (reachable from other machines)",
        "farflung directory --listen 127.0.0.1:0 --json      (a free port; the first line says which)",
    )
)
def directory(
    *,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where to answer HTTP; port 0 takes a free one.")
    ] = DEFAULT_LISTEN,
    swarm_key: SwarmKeyOption = "",
    state: State = None,
    exit_with_stdin: ExitWithStdin = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the directory: it knows which nodes exist, which layers they serve and how far apart they are.

    Nodes and drivers find each other here; no token passes through it. With --swarm-key it takes that
    swarm's nodes alone. Runs until Ctrl-C or SIGTERM.
    """
    with command(json=json, debug=debug) as out:
        watch = ParentWatch() if exit_with_stdin else None
        if state is not None:
            out.note("the directory keeps everything in memory: --state has nothing to keep yet")
        asyncio.run(_serve(out, listen, read_swarm_key(swarm_key), watch))


async def _serve(out: Output, listen: str, swarm_key: SwarmKey | None, watch: ParentWatch | None) -> None:
    from farflung.swarm.http_server import DirectoryServer, DirectoryServerConfig
    from farflung.swarm.service import ServiceConfig

    config = DirectoryServerConfig(listen=listen, service=ServiceConfig(swarm_key=swarm_key))
    with stop_requests(watch) as stop:
        async with DirectoryServer(config) as server:
            out.json({"event": "ready", "url": server.url})
            out.print(f"directory at {server.url}")
            out.note(f"add a node:  farflung node --directory {server.url} --model MODEL --layers auto")
            await stop.wait()
            out.note("stopping")


@contextlib.asynccontextmanager
async def directory_at(url: str, swarm_key: SwarmKey | None = None) -> AsyncIterator[Directory]:
    """A client of the directory at ``url`` while the block runs; with a key only members of its swarm are seen. Raises
    UsageError where that is no URL."""
    from farflung.swarm.http_client import HttpDirectory, HttpDirectoryConfig
    from farflung.swarm.members import members_only

    jitter = Random()  # noqa: S311 - spreads reconnects; no secret
    async with contextlib.aclosing(HttpDirectory(HttpDirectoryConfig(url), wall_clock=time.time, random=jitter)) as client:
        yield members_only(client, swarm_key)

"""Processes of a benchmark inside the lab's nodes: ``python -m farflung.lab.bench.member CONFIG`` with CONFIG as JSON.

``ReplayStage`` serves layers of a model that is not there; ``BenchDriver`` drives generations that it is asked for, a line of
JSON each, and answers each with a line. Both say that they are ready by a line, and end when their stdin closes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import msgspec
import structlog

from farflung.core.errors import FarflungError, LabError, first_cause
from farflung.core.model import LayerRange, ModelSpec
from farflung.engine.replay_backend import ReplayBackend, ReplayConfig, ReplayModel
from farflung.engine.replay_tokens import PathTokens, TokenSource, read_traces
from farflung.identity.keys import Identity
from farflung.node.service import Node, NodeConfig, NodePorts
from farflung.session.options import GenerateOptions
from farflung.session.swarm import DriverPorts, Swarm
from farflung.swarm.http_client import HttpDirectory, HttpDirectoryConfig
from farflung.swarm.records import NodeRecord, Query
from farflung.transport.hello import HELLO
from farflung.transport.link import LinkConfig
from farflung.transport.tcp import TcpTransport

TOKENS_BEFORE_OTHER = 8
"""Of a running session, before another begins beside it."""


class Shape(msgspec.Struct, frozen=True):
    """A replayed model: see ``ReplayModel``; tokens come from ``seed`` and the traces of that folder."""

    name: str
    layers: int
    hidden_size: int
    vocab_size: int
    seed: int = 0
    traces: str = ""

    def spec(self) -> ModelSpec:
        return ReplayModel(name=self.name, layers=self.layers, hidden_size=self.hidden_size, vocab_size=self.vocab_size).spec()

    def tokens(self) -> PathTokens:
        traces = read_traces(Path(self.traces)) if self.traces else ()
        return PathTokens(TokenSource(vocab_size=self.vocab_size, seed=self.seed, traces=traces))


class ReplayStage(msgspec.Struct, frozen=True, tag="stage"):
    """A node: where it listens, which layers it has and how long they take."""

    directory: str
    listen: str
    shape: Shape
    layers: tuple[int, int]
    curve_ms: tuple[tuple[int, float], ...]
    kv_tokens: int = 65536


class BenchDriver(msgspec.Struct, frozen=True, tag="driver"):
    """A driver of a real model (a name) or of a replayed one."""

    directory: str
    model: str = ""
    shape: Shape | None = None


class Request(msgspec.Struct, frozen=True):
    """Generations that are begun together. Prompts are random ids, each of its own, so that no cache helps.

    Attributes:
        chunk_tokens: prompt tokens per window; 0: the driver chooses.
        other_prompt_tokens: above 0: after some tokens of the one session another begins, with such a prompt, and both end with
            its first token. Of the first session those times between tokens are told that lie in between.
    """

    prompt_tokens: int
    max_tokens: int
    seed: int
    codec: str = "int8"
    chunk_tokens: int = 0
    sessions: int = 1
    other_prompt_tokens: int = 0


class Measured(msgspec.Struct, frozen=True):
    """What a generation measured; see ``GenerationStats``.

    Attributes:
        stage_ms: of each stage, the median of its decode steps as it timed them itself.
        same_tokens: they were the ones that the path has (of a replay; else None).
        curves: T-curve of each stage, as it announced it.
        chunk_tokens: of the prompt in each window.
        link_bytes_per_s: at which each stage but the last saw its bytes arrive at the next; 0: not measured.
    """

    ttft_s: float
    inter_token_s: list[float]
    between_stages: float
    driver_up: float
    driver_down: float
    bytes_sent: int
    stage_ms: list[float]
    token_ids: list[int]
    same_tokens: bool | None
    curves: list[list[tuple[int, float]]]
    reconnects: int
    chunk_tokens: int = 0
    link_bytes_per_s: list[float] = []


class Answer(msgspec.Struct, frozen=True):
    """What became of a request: every generation, and the time from the first's beginning to the last's end."""

    runs: list[Measured]
    wall_s: float


async def serve_replay(stage: ReplayStage) -> None:
    identity = Identity.generate()
    backend = ReplayBackend(
        stage.shape.spec(),
        LayerRange(*stage.layers),
        stage.shape.tokens(),
        ReplayConfig(curve_ms=stage.curve_ms, kv_tokens=stage.kv_tokens),
    )
    async with _directory(stage.directory) as directory:
        node = Node(
            NodeConfig(listen=stage.listen, t_curve_ms=dict(stage.curve_ms), drain_timeout_s=1.0),
            NodePorts(
                identity=identity,
                transport=TcpTransport(identity, LinkConfig(), hello=HELLO),
                directory=directory,
                backend=backend,
                clock=time.time,
                random=Random(),  # noqa: S311 - jitter
            ),
        )
        await node.start()
        try:
            _say({"event": "ready", "node_id": node.node_id, "layers": list(stage.layers)})
            async for _ in _lines():
                pass
        finally:
            await node.drain()
            await backend.aclose()


async def drive(driver: BenchDriver) -> None:
    async with _swarm(driver) as swarm, _directory(driver.directory) as directory:
        tokens = driver.shape.tokens() if driver.shape is not None else None
        _say({"event": "ready", "hidden_size": swarm.spec.hidden_size, "layers": swarm.spec.layers})
        async for line in _lines():
            request = msgspec.json.decode(line, type=Request)
            try:
                _say(msgspec.to_builtins(await _answer(swarm, directory, request, tokens)))
            except* FarflungError as group:
                error = first_cause(group) or FarflungError("a generation failed")
                _say({"error": {"code": error.code, "message": error.message, "hint": error.hint}})


async def _answer(swarm: Swarm, directory: HttpDirectory, request: Request, tokens: PathTokens | None) -> Answer:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    if request.other_prompt_tokens:
        runs = await _beside_a_prompt(swarm, directory, request, tokens)
        return Answer(runs, loop.time() - began_s)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_generate(swarm, directory, request, number, tokens)) for number in range(request.sessions)]
    return Answer([task.result() for task in tasks], loop.time() - began_s)


async def _beside_a_prompt(
    swarm: Swarm, directory: HttpDirectory, request: Request, tokens: PathTokens | None
) -> list[Measured]:
    """The running session, and the other one."""
    prompt = Request(request.other_prompt_tokens, 1, request.seed, request.codec, request.chunk_tokens)
    async with asyncio.TaskGroup() as group:
        other: asyncio.Task[Measured] | None = None
        first = 0

        def goes_on(so_far: int) -> bool:
            nonlocal other, first
            if so_far == TOKENS_BEFORE_OTHER:
                other = group.create_task(_generate(swarm, directory, prompt, 1, tokens))
                first = so_far - 1
            return other is None or not other.done()

        running = await _generate(swarm, directory, request, 0, tokens, goes_on=goes_on)
    if other is None:
        raise LabError(f"{request.max_tokens} tokens are too few", hint=f"ask for more than {TOKENS_BEFORE_OTHER}")
    return [msgspec.structs.replace(running, inter_token_s=running.inter_token_s[first:]), other.result()]


async def _generate(
    swarm: Swarm,
    directory: HttpDirectory,
    request: Request,
    number: int,
    tokens: PathTokens | None,
    *,
    goes_on: Callable[[int], bool] = lambda so_far: True,
) -> Measured:
    """One generation, as long as ``goes_on`` says of the number of tokens so far."""
    draw = Random(f"{request.seed} {number}")  # noqa: S311 - a prompt
    prompt = [draw.randrange(min(swarm.spec.vocab_size, 30_000)) for _ in range(request.prompt_tokens)]
    options = GenerateOptions(
        max_tokens=request.max_tokens, codecs=(request.codec,), ignore_eos=True, chunk_tokens=request.chunk_tokens
    )
    generation = swarm.generate(prompt, options)
    async with aclosing(aiter(generation)) as stream:
        async for _ in stream:
            if not goes_on(len(generation.stats.token_ids)):
                break
    stats, hops = generation.stats, generation.stats.route.hops if generation.stats.route is not None else ()
    timelines = [line for line in stats.timelines if len(line) == len(hops) and all(s.step_rows == 1 for s in line)]
    stage_ms = [median(line[index].step_ms for line in timelines) for index in range(len(hops))] if timelines else []
    curve_of = {record.node_id: record.t_curve_ms for record in await _records(directory, swarm.spec)}
    curves = [list(curve_of.get(hop.node_id, ())) for hop in hops]
    size = stats.bytes_per_token()
    return Measured(
        ttft_s=stats.ttft_s or 0.0,
        inter_token_s=list(stats.inter_token_s),
        between_stages=size["between_stages_max"],
        driver_up=size["driver_up"],
        driver_down=size["driver_down"],
        bytes_sent=stats.bytes_sent,
        stage_ms=stage_ms or [stage.decode_ms for stage in stats.stages],
        token_ids=list(stats.token_ids),
        same_tokens=None if tokens is None else list(stats.token_ids) == tokens.continuation(prompt, len(stats.token_ids)),
        curves=curves,
        reconnects=stats.reconnects,
        chunk_tokens=stats.chunk_tokens,
        link_bytes_per_s=[stage.bytes_per_s for stage in list(stats.timelines)[-1][:-1]] if stats.timelines else [],
    )


@asynccontextmanager
async def _swarm(driver: BenchDriver) -> AsyncGenerator[Swarm, None]:
    if driver.shape is None:
        async with Swarm.connect(driver.directory, driver.model) as swarm:
            yield swarm
        return
    identity = Identity.generate()
    async with _directory(driver.directory) as directory:
        ports = DriverPorts(
            identity=identity,
            transport=TcpTransport(identity, LinkConfig()),
            directory=directory,
            clock=time.time,
            random_bytes=secrets.token_bytes,
        )
        async with Swarm(driver.shape.spec(), None, ports, directory_url=driver.directory) as swarm:
            yield swarm


async def _records(directory: HttpDirectory, spec: ModelSpec) -> Sequence[NodeRecord]:
    return await directory.records(Query(model=spec.digest))


@asynccontextmanager
async def _directory(url: str) -> AsyncGenerator[HttpDirectory, None]:
    client = HttpDirectory(HttpDirectoryConfig(url=url), wall_clock=time.time, random=Random())  # noqa: S311 - jitter
    async with aclosing(client):
        yield client


async def _lines() -> AsyncGenerator[bytes, None]:
    """Lines of stdin, to its end."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while line := await reader.readline():
            yield line
    finally:
        transport.close()


def _say(what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    # stdout is for those lines alone
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
    member = msgspec.json.decode(sys.argv[1].encode(), type=ReplayStage | BenchDriver)
    try:
        asyncio.run(serve_replay(member) if isinstance(member, ReplayStage) else drive(member))
    except FarflungError as error:
        _say({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
        sys.exit(1)


if __name__ == "__main__":
    main()

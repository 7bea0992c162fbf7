"""Runs a scenario: the real directory, nodes and drivers over memory links, with replay backends, on any loop.

``simulate`` does it on a virtual clock. All that is drawn comes from the scenario's seed, and a row has nothing that depends on
the machine, so two runs of one scenario give equal rows.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from farflung.core.errors import FarflungError
from farflung.core.ids import NodeId
from farflung.core.model import LayerRange, ModelSpec
from farflung.engine.replay_backend import ReplayBackend, ReplayConfig, ReplayModel
from farflung.engine.replay_tokens import PathTokens, TokenSource, Trace, read_traces
from farflung.lab.scenario import Fault, Load, Scenario
from farflung.lab.virtual_clock import VirtualClockLoop, run_virtual
from farflung.lab.world import World, WorldConfig
from farflung.node.service import NodeConfig
from farflung.session.options import GenerateOptions
from farflung.session.stats import GenerationStats
from farflung.session.swarm import Swarm
from farflung.swarm.directory import Change, Directory, NodeGone, NodeSeen, Snapshot
from farflung.swarm.links import MeasuredLink, SignedLinks
from farflung.swarm.records import EVERYTHING, NodeRecord, Query, SignedRecord, SignedWithdrawal
from farflung.transport.link import LinkConfig

WARM_UP_TOKENS = 64
SETTLE_S = 4.0
"""After the warm-up: links have told each other their rates, and nodes pace prompts no more for those who decoded then."""


@dataclass
class SessionRun:
    """One session of a load.

    Attributes:
        driver: who ran it.
        began_s, ended_s: after the load's time 0.
        stats: what the driver measured.
        same_tokens: every token was the one that its path has.
        error: why it failed; empty where it did not.
    """

    driver: str
    began_s: float
    ended_s: float
    stats: GenerationStats
    same_tokens: bool
    error: str = ""


@dataclass
class Simulated:
    """What came of a scenario.

    Attributes:
        runs: the sessions of each load, by its name, in the order in which they were begun.
        virtual_s: from the world's beginning to its end, on its clock; ``real_s`` on the machine's.
        node_names: of each node id, and the drivers'.
    """

    runs: dict[str, list[SessionRun]] = field(default_factory=lambda: defaultdict(list))
    virtual_s: float = 0.0
    real_s: float = 0.0
    node_names: dict[NodeId, str] = field(default_factory=dict)


def simulate(scenario: Scenario, clock: Callable[[], float] = time.perf_counter) -> Simulated:
    """Runs it on a virtual clock; ``clock`` tells real seconds. Raises FarflungError where the swarm cannot be set up."""
    began = clock()
    with _rare_collections():
        done = run_virtual(play(scenario))
    done.real_s = clock() - began
    return done


@contextmanager
def _rare_collections() -> Iterator[None]:
    """A large world lives as long as its simulation: to look through it for garbage at the usual rate took a sixth of the
    time."""
    usual = gc.get_threshold()
    gc.set_threshold(100_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


async def play(scenario: Scenario) -> Simulated:
    """Runs it on the running loop, whose clock decides how long that takes. Raises as ``simulate``."""
    loop = asyncio.get_running_loop()
    began_s, done = loop.time(), Simulated()
    traces = read_traces(Path(scenario.traces)) if scenario.traces else ()
    model = scenario.model
    spec = ReplayModel(
        name=model.name,
        layers=model.layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        context_tokens=model.context_tokens,
    ).spec()
    tokens = PathTokens(TokenSource(vocab_size=spec.vocab_size, seed=scenario.seed, traces=traces))
    sees = {f"{group.name}{n}": group.sees for group in scenario.drivers for n in range(1, group.count + 1)}

    def view(name: str, directory: Directory) -> Directory:
        return _Sample(directory, sees[name], Random(f"{scenario.seed} {name}")) if sees.get(name) else directory  # noqa: S311

    link = LinkConfig(heartbeat_s=scenario.heartbeat_s, dead_after_s=5 * scenario.heartbeat_s)
    async with World(WorldConfig(seed=scenario.seed, link=link, wrap_directory=view)) as world:
        await _populate(world, scenario, spec, tokens)
        player = _Player(world, scenario, tokens, traces, done)
        if scenario.warm:
            await player.warm_up()
        async with asyncio.timeout(scenario.timeout_s), asyncio.TaskGroup() as group:
            breaking = group.create_task(player.break_things())
            loads = [group.create_task(player.load(load)) for load in scenario.load]
            await asyncio.gather(*loads)
            breaking.cancel()
        done.node_names = {world.node_id(name): name for name in [*world.nodes, *world.swarms]}
    done.virtual_s = loop.time() - began_s
    return done


async def _populate(world: World, scenario: Scenario, spec: ModelSpec, tokens: PathTokens) -> None:
    virtual = isinstance(asyncio.get_running_loop(), VirtualClockLoop)
    counts: dict[str, int] = defaultdict(int)
    members = []
    for group in scenario.nodes:
        config = ReplayConfig(curve_ms=group.curve, kv_tokens=group.kv_tokens, virtual=virtual)
        access = group.net.access
        for layers in group.ranges(spec.layers):
            counts[group.name] += 1
            backend = ReplayBackend(spec, layers, tokens, config)
            members.append((f"{group.name}{counts[group.name]}", backend, NodeConfig(t_curve_ms=dict(group.curve)), access))
    await world.add_nodes(members)
    for drivers in scenario.drivers:
        for number in range(1, drivers.count + 1):
            await world.add_driver(f"{drivers.name}{number}", spec, drivers.net.access)


class _Player:
    """Sessions and faults of one scenario."""

    def __init__(self, world: World, scenario: Scenario, tokens: PathTokens, traces: Sequence[Trace], done: Simulated) -> None:
        self._world = world
        self._scenario = scenario
        self._tokens = tokens
        self._traces = traces
        self._done = done
        self._loop = asyncio.get_running_loop()
        self._zero_s = 0.0

    async def warm_up(self) -> None:
        """One short session of each driver; what fails then will fail again, and be told."""
        async with asyncio.TaskGroup() as group:
            for swarm in self._world.swarms.values():
                group.create_task(self._warm(swarm))
        await asyncio.sleep(SETTLE_S)

    async def load(self, load: Load) -> None:
        """All sessions of one load, to their ends."""
        self._zero_s = self._zero_s or self._loop.time()
        drivers = [name for name in self._world.swarms if name.rstrip("0123456789") == load.drivers]
        draw = self._world.random(f"load {load.name}")
        await asyncio.sleep(load.start_s)
        async with asyncio.TaskGroup() as group:
            for number in range(load.sessions):
                if number:
                    await asyncio.sleep(draw.expovariate(1 / load.every_s) if load.random and load.every_s else load.every_s)
                running = group.create_task(
                    self._session(load, drivers[number % len(drivers)], self._prompt(load, number, draw))
                )
                if load.one_by_one:
                    await running

    async def break_things(self) -> None:
        """The faults, each in its time."""
        zero_s = self._loop.time()
        for fault in sorted(self._scenario.faults, key=lambda fault: fault.at_s):
            await asyncio.sleep(max(0.0, zero_s + fault.at_s - self._loop.time()))
            self._break(fault)

    def _break(self, fault: Fault) -> None:
        world = self._world
        if fault.kind == "crash":
            world.crash(fault.node)
            return
        one, other = world.node_id(fault.a), world.node_id(fault.b)
        {"cut": world.network.cut, "silence": world.network.silence, "heal": world.network.heal}[fault.kind](one, other)

    async def _warm(self, swarm: Swarm) -> None:
        options = GenerateOptions(max_tokens=2, ignore_eos=True)
        try:
            await swarm.generate(tuple(range(1, WARM_UP_TOKENS + 1)), options).text()
        except FarflungError:
            return

    def _prompt(self, load: Load, number: int, draw: Random) -> tuple[int, ...]:
        if load.traces:
            return self._traces[number % len(self._traces)].prompt_ids
        return tuple(draw.randrange(self._scenario.model.vocab_size) for _ in range(load.prompt_tokens))

    async def _session(self, load: Load, driver: str, prompt: tuple[int, ...]) -> None:
        began_s, error = self._loop.time(), ""
        generation = self._world.swarms[driver].generate(
            prompt,
            GenerateOptions(
                max_tokens=load.max_tokens,
                codecs=load.codecs,
                chunk_tokens=load.chunk_tokens,
                ignore_eos=True,
                batch=load.batch,
                answer_timeout_s=self._scenario.timeout_s,
            ),
        )
        run = SessionRun(driver, began_s - self._zero_s, 0.0, generation.stats, False)
        self._done.runs[load.name].append(run)
        try:
            await generation.text()
        except FarflungError as failure:
            error = f"{failure.code}: {failure}"
        got = generation.stats.token_ids
        run.ended_s, run.error = self._loop.time() - self._zero_s, error
        run.same_tokens = got == self._tokens.continuation(prompt, len(got))


class _Sample:
    """A directory of which its client sees a part: of each range of layers so many nodes, drawn once and for all."""

    def __init__(self, inner: Directory, most: int, random: Random) -> None:
        self._inner = inner
        self._most = most
        self._random = random
        self._chosen: dict[LayerRange, dict[NodeId, None]] = defaultdict(dict)

    async def announce(self, signed: SignedRecord) -> None:
        await self._inner.announce(signed)

    async def withdraw(self, signed: SignedWithdrawal) -> None:
        await self._inner.withdraw(signed)

    async def records(self, query: Query = EVERYTHING) -> list[NodeRecord]:
        return self._some(await self._inner.records(query))

    async def watch(self, query: Query = EVERYTHING) -> AsyncGenerator[Change, None]:
        async for change in self._inner.watch(query):
            match change:
                case Snapshot(records, restarted):
                    yield Snapshot(tuple(self._some(records)), restarted)
                case NodeSeen(record):
                    if self._some((record,)):
                        yield change
                case NodeGone():
                    yield change

    async def report_links(self, signed: SignedLinks) -> None:
        await self._inner.report_links(signed)

    async def links(self) -> list[MeasuredLink]:
        return await self._inner.links()

    async def aclose(self) -> None:
        await self._inner.aclose()

    def _some(self, records: Sequence[NodeRecord]) -> list[NodeRecord]:
        for record in self._random.sample(records, len(records)):
            chosen = self._chosen[record.layers]
            if len(chosen) < self._most:
                chosen.setdefault(record.node_id)
        return [record for record in records if record.node_id in self._chosen[record.layers]]

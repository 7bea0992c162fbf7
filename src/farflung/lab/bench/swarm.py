"""A swarm inside the lab: a directory, a node for each stage and a driver, each a process with an address of its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec

from farflung.lab.bench.case import DIRECTORY, DRIVER, REPLAY_HIDDEN, REPLAY_LAYERS, REPLAY_VOCABULARY, Case
from farflung.lab.bench.member import Answer, BenchDriver, Measured, ReplayStage, Request, Shape
from farflung.lab.net import Lab, LabProcess

START_TIMEOUT_S = 600.0
"""For a node to load its layers; one that dies is seen at once."""

ANSWER_TIMEOUT_S = 600.0

ENVIRONMENT = {"FARFLUNG_DEFAULTS": "off", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
CHILD = ("--json", "--exit-with-stdin")
PYTHON = (sys.executable, "-m")


@dataclass(frozen=True)
class LabSwarm:
    """A running swarm. ``hidden_size`` is the model's."""

    lab: Lab
    driver: LabProcess
    hidden_size: int

    async def generate(self, request: Request) -> Measured:
        """One generation. Raises LabError with what the driver says, DeadlineExceeded."""
        return (await self.generate_together(request)).runs[0]

    async def generate_together(self, request: Request) -> Answer:
        """All the generations of a request. Raises as ``generate``."""
        self.driver.send_line(msgspec.json.encode(request).decode())
        return msgspec.convert(await self.driver.event(ANSWER_TIMEOUT_S), type=Answer)


@asynccontextmanager
async def lab_swarm(case: Case, progress: Callable[[str], object] = lambda _: None) -> AsyncGenerator[LabSwarm, None]:
    """The swarm of a case while the block runs. Raises LabUnavailable, LabError, DeadlineExceeded."""
    async with Lab(case.topology()) as lab:
        progress("starting a directory")
        directory = await lab.start(
            DIRECTORY,
            [*PYTHON, "farflung", "directory", "--listen", f"{lab.address(DIRECTORY)}:7700", *CHILD],
            env=ENVIRONMENT,
            name="the directory",
        )
        url = (await directory.event(START_TIMEOUT_S))["url"]
        progress(f"starting {case.stages} nodes, each a process")
        stages = [await _start_stage(lab, case, url, number) for number in range(case.stages)]
        for stage in stages:
            await stage.event(START_TIMEOUT_S)
        config = BenchDriver(url, case.model, _shape(case))
        driver = await lab.start(DRIVER, _member(config), env=ENVIRONMENT, name="the driver")
        ready = await driver.event(START_TIMEOUT_S)
        yield LabSwarm(lab, driver, ready["hidden_size"])
        await asyncio.gather(*(process.end() for process in (driver, *stages)))


async def _start_stage(lab: Lab, case: Case, url: str, number: int) -> LabProcess:
    node = case.stage_names[number]
    listen = f"{lab.address(node)}:7800"
    shape = _shape(case)
    if shape is not None:
        argv = _member(ReplayStage(url, listen, shape, case.replay_layers(number), case.replay_curve()))
    else:
        part = f"{number + 1}/{case.stages}"
        model = ["--model", case.model, "--layers", part, "--dtype", case.dtype, "--threads", str(case.threads)]
        lease = (case.sessions + 3) * (case.prompt_tokens + case.tokens + 64)
        serving = ["--listen", listen, "--open-to-anyone", "--driver-share", "1", "--kv-tokens", str(lease), "--ephemeral"]
        argv = [*PYTHON, "farflung", "node", "--directory", url, *model, *serving, *CHILD]
    return await lab.start(node, argv, env={**ENVIRONMENT, "OMP_NUM_THREADS": str(case.threads)}, name=node)


def _shape(case: Case) -> Shape | None:
    if case.backend != "replay":
        return None
    traces = str(case.traces) if case.traces is not None else ""
    return Shape(case.model, REPLAY_LAYERS, REPLAY_HIDDEN, REPLAY_VOCABULARY, case.seed, traces)


def _member(config: ReplayStage | BenchDriver) -> list[str]:
    return [*PYTHON, "farflung.lab.bench.member", msgspec.json.encode(config).decode()]

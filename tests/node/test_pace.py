"""Prompts beside those who decode, on the virtual clock: stages whose steps take time by a T-curve, real sessions and links."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from models import VOCABULARY, tiny_model
from timed_backend import TimedBackend
from virtual_swarm import World, WorldConfig, world

from farflung.core.messages import Window
from farflung.engine.backend import StageBackend
from farflung.lab.virtual_clock import run_virtual
from farflung.node.service import NodeConfig
from farflung.session.options import GenerateOptions
from farflung.transport.memory import LinkShape

CURVE = {1: 10.0, 16: 12.0, 64: 28.0, 256: 100.0}
ALONE_S = 0.010
BOUND_S = 0.020
"""What a step may take while one session decodes: twice the time of its own row."""
LONG_PROMPT = tuple(3 + index * 7 % (VOCABULARY - 3) for index in range(2000))
EXACT = {"codecs": ("fp32",), "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), layers=3, max_position_embeddings=4096)


@dataclass
class Timed:
    """A world of timed stages, and when tokens came."""

    made: World
    stages: list[TimedBackend]
    times: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    async def generate(
        self, name: str, prompt: tuple[int, ...], max_tokens: int, *, batch: bool = False, twenty: asyncio.Event | None = None
    ) -> None:
        """``twenty`` is set when so many tokens have come."""
        times, tokens = self.times.setdefault(name, []), self.tokens.setdefault(name, [])
        async for token in self.made.swarm.generate(prompt, GenerateOptions(max_tokens=max_tokens, batch=batch, **EXACT)):
            if token.id is not None:
                times.append(asyncio.get_running_loop().time())
                tokens.append(token.id)
            if twenty is not None and len(times) == 20:
                twenty.set()

    def gaps(self, name: str) -> list[float]:
        return [after - before for before, after in pairwise(self.times[name])]


async def timed_world(model: Path, body: Callable[[Timed], Awaitable[None]]) -> Timed:
    stages: list[TimedBackend] = []

    def wrap(backend: StageBackend) -> StageBackend:
        stages.append(TimedBackend(backend, sorted(CURVE.items())))
        return stages[-1]

    config = WorldConfig(
        model=model,
        cuts=(1, 2),
        kv_tokens=8192,
        shape=LinkShape(delay_s=0.002, rate_bytes_per_s=125e6),
        node=NodeConfig(t_curve_ms=CURVE),
        wrap=wrap,
    )
    async with world(config) as made:
        timed = Timed(made, stages)
        await body(timed)
        await made.settle()
    return timed


def waits_of_decode(timed: Timed, number: int) -> list[float]:
    """How long each one-row window waited at a stage for the step that computed it, in the order of the steps."""
    stage, node_id = timed.stages[number], timed.made.nodes[number].node_id
    arrivals = sorted(
        frame.time_s
        for frame in timed.made.log
        if frame.receiver == node_id and isinstance(frame.message, Window) and frame.message.rows == 1
    )
    starts = sorted(step.start_s for step in stage.steps if 1 in step.rows.values())
    return [starts[bisect_left(starts, arrival)] - arrival for arrival in arrivals]


def test_a_stage_never_lets_a_long_prompt_hold_a_waiting_decode_longer_than_one_chunk(model: Path) -> None:
    async def body(timed: Timed) -> None:
        twenty = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(timed.generate("talk", (5, 6, 7), 150, twenty=twenty))
            await twenty.wait()
            group.create_task(timed.generate("prompt", LONG_PROMPT, 1))

    timed = run_virtual(timed_world(model, body))
    asked_s = timed.times["talk"][19]
    answered_s = timed.times["prompt"][0]
    assert asked_s < answered_s < timed.times["talk"][-1]  # the prompt came while the other decoded, and came through
    for number, stage in enumerate(timed.stages):
        beside = [step for step in stage.steps if asked_s < step.start_s < answered_s]
        assert sum(sum(step.rows.values()) for step in beside) >= len(LONG_PROMPT)
        assert max(step.stop_s - step.start_s for step in beside) <= BOUND_S + 1e-9
        assert max(waits_of_decode(timed, number)) <= BOUND_S + 1e-9
    # Per stage a token takes its own step and at most the rest of another.
    slowest = max(timed.gaps("talk"))
    assert slowest <= timed.gaps("talk")[10] + 3 * (BOUND_S - ALONE_S + BOUND_S) + 1e-6


def test_a_prompt_goes_in_full_steps_where_nobody_decodes(model: Path) -> None:
    async def body(timed: Timed) -> None:
        await timed.generate("prompt", LONG_PROMPT, 1)

    timed = run_virtual(timed_world(model, body))
    for stage in timed.stages:
        assert max(max(step.rows.values()) for step in stage.steps) >= 96  # the chunks that the planner chose, whole


def test_batch_prompts_leave_the_pace_of_interactive_prompts_and_come_through(model: Path) -> None:
    async def alone(timed: Timed) -> None:
        await timed.generate("asked", LONG_PROMPT, 1)

    async def beside(timed: Timed) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(timed.generate(f"batch {number}", LONG_PROMPT, 1, batch=True))
            group.create_task(timed.generate("asked", LONG_PROMPT, 1))

    first, second = run_virtual(timed_world(model, alone)), run_virtual(timed_world(model, beside))
    assert second.times["asked"][0] <= 1.4 * first.times["asked"][0]  # with equal shares it would be four times
    assert second.tokens["asked"] == first.tokens["asked"]
    assert all(second.tokens[f"batch {number}"] == first.tokens["asked"] for number in range(3))


def test_eight_sessions_at_once_say_what_each_says_alone(model: Path) -> None:
    prompts = [tuple(3 + (index * 11 + number * 5) % 300 for index in range(10 + 9 * number)) for number in range(8)]

    async def alone(timed: Timed) -> None:
        for number, prompt in enumerate(prompts):
            await timed.generate(str(number), prompt, 20)

    async def together(timed: Timed) -> None:
        async with asyncio.TaskGroup() as group:
            for number, prompt in enumerate(prompts):
                group.create_task(timed.generate(str(number), prompt, 20))

    first, second = run_virtual(timed_world(model, alone)), run_virtual(timed_world(model, together))
    assert second.tokens == first.tokens
    assert any(len(step.rows) > 2 for step in second.stages[2].steps)

"""Many sessions on one route: each as when alone, and nothing left behind whatever becomes of them. On the virtual clock."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from models import tiny_model
from virtual_swarm import World, WorldConfig, world

from farflung.core.messages import Ids, Open, Window
from farflung.core.sampling import SamplingOptions
from farflung.lab.virtual_clock import run_virtual
from farflung.node.quotas import Quotas
from farflung.node.service import NodeConfig
from farflung.session.options import GenerateOptions
from farflung.wire.codec import CODEC_NAMES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), layers=6)


def prompt_of(number: int) -> list[int]:
    return [5 + (number * 7 + place) % 60 for place in range(3 + number % 9)]


def options_of(number: int, max_tokens: int = 12) -> GenerateOptions:
    """Every third session is greedy, the others sample, some with penalties, so that token ids travel beside their rows."""
    sampling = SamplingOptions(
        temperature=0.0 if number % 3 == 0 else 1.0, seed=number, frequency_penalty=0.7 if number % 3 == 2 else 0.0
    )
    return GenerateOptions(max_tokens=max_tokens, codecs=("fp32",), ignore_eos=True, sampling=sampling)


async def ids_of(made: World, number: int, leave_after: int | None = None) -> list[int]:
    found: list[int] = []
    generation = made.swarm.generate(prompt_of(number), options_of(number))
    tokens = aiter(generation)
    async for token in tokens:
        if token.id is not None:
            found.append(token.id)
        if len(found) == leave_after:
            await tokens.aclose()
            break
    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_of_64_sessions_half_are_cancelled_at_random_and_leases_logs_and_tasks_return_to_zero(model: Path, seed: int) -> None:
    async def run() -> None:
        chance = random.Random(seed)
        node = NodeConfig(quotas=Quotas(sessions_per_owner=72))
        async with world(WorldConfig(model=model, cuts=(2, 4), kv_tokens=72 * 32, seed=seed, node=node)) as made:
            alone = {number: await ids_of(made, number) for number in range(6)}
            await made.settle()
            before = len(asyncio.all_tasks())
            leaves = {number: chance.randrange(1, 12) for number in chance.sample(range(64), 32)}
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(ids_of(made, number, leaves.get(number))) for number in range(64)]
                late = [group.create_task(ids_of(made, number)) for number in range(64, 72)]
                await asyncio.sleep(chance.uniform(0.05, 0.2))
                for task in late:  # whoever waits for a token, or for the route, may be cancelled as well
                    task.cancel()
            await made.settle()
            for number, task in enumerate(running):
                found = task.result()
                assert len(found) == leaves.get(number, 12)
                assert found == alone.get(number, found)[: len(found)]
            assert [node.log_memory for node in made.nodes] == [0, 0, 0]
            assert all(node.table.waiting_owners == 0 for node in made.nodes)
            await asyncio.sleep(1)
            assert len(asyncio.all_tasks()) == before

    run_virtual(run())


def test_each_of_eight_sessions_gets_the_tokens_it_gets_alone(model: Path) -> None:
    async def run() -> None:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            alone = [await ids_of(made, number) for number in range(8)]
            async with asyncio.TaskGroup() as group:
                together = [group.create_task(ids_of(made, number)) for number in range(8)]
            assert [task.result() for task in together] == alone

    run_virtual(run())


def test_only_the_tail_is_told_the_tokens_and_only_where_sampling_looks_back(model: Path) -> None:
    async def run() -> None:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            await ids_of(made, 1)
            assert not any(isinstance(frame.message, Ids) for frame in made.log)
            await ids_of(made, 2)
            told = [(frame.sender, frame.receiver) for frame in made.log if isinstance(frame.message, Ids)]
            assert set(told) == {(made.driver_id, made.nodes[2].node_id)}
            between = [frame for frame in made.log if isinstance(frame.message, Window) and frame.sender != made.driver_id]
            assert between
            assert all(len(frame.sizes) == 1 for frame in between)

    run_virtual(run())


def test_each_edge_has_the_first_allowed_codec_that_its_receiver_speaks(model: Path) -> None:
    async def run() -> None:
        speaks = (CODEC_NAMES, ("fp32", "bf16", "int8"), ("fp32", "bf16"))
        async with world(WorldConfig(model=model, cuts=(2, 4), codecs=speaks)) as made:
            options = GenerateOptions(max_tokens=3, codecs=("int4", "bf16"), ignore_eos=True)
            for _ in range(2):  # at first links are not up, then it is known what the others speak
                assert len([token async for token in made.swarm.generate(prompt_of(1), options)]) == 3
            opened = {
                (frame.receiver, frame.message.codec)
                for frame in made.log
                if isinstance(frame.message, Open) and frame.sender != made.driver_id
            }
            assert opened == {(made.nodes[1].node_id, "bf16"), (made.nodes[2].node_id, "bf16")}

    run_virtual(run())

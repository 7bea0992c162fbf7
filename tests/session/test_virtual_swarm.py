"""The real node, directory and driver over memory links on the virtual clock."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from models import tiny_model, whole_model
from virtual_swarm import Recorded, World, WorldConfig, world

from farflung.core.errors import (
    Cancelled,
    FarflungError,
    LayersMissing,
    PromptTooLong,
    SessionRefused,
    StageLost,
    UsageError,
)
from farflung.core.messages import Attach, Open, Window
from farflung.core.sampling import SamplingOptions
from farflung.lab.virtual_clock import run_virtual
from farflung.session.options import GenerateOptions
from farflung.transport.memory import LinkShape

PROMPT = tuple(range(5, 45))
FP32 = GenerateOptions(max_tokens=24, codecs=("fp32",), ignore_eos=True, chunk_tokens=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), layers=6)


@pytest.fixture(scope="module")
def greedy(model: Path) -> list[int]:
    """What plain transformers generates."""
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        out = whole_model(model).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
    return [int(token) for token in out[0, len(PROMPT) :]]


async def ids_of(made: World, options: GenerateOptions = FP32, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    return [token.id async for token in made.swarm.generate(prompt, options) if token.id is not None]


def test_three_stages_generate_what_the_whole_model_does(model: Path, greedy: list[int]) -> None:
    async def run() -> list[int]:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            tokens = await ids_of(made)
            await made.settle()
            return tokens

    assert run_virtual(run()) == greedy


def test_two_runs_on_the_virtual_clock_give_identical_event_logs(model: Path) -> None:
    async def run(seed: int) -> tuple[list[int], list[Recorded]]:
        async with world(WorldConfig(model=model, cuts=(2, 4), seed=seed)) as made:
            return await ids_of(made), list(made.log)

    first, second, other = run_virtual(run(3)), run_virtual(run(3)), run_virtual(run(4))
    assert first == second
    assert len(first[1]) > 100
    assert first[0] == other[0]
    assert [event.time_s for event in first[1]] != [event.time_s for event in other[1]]


def test_the_opening_rides_with_the_prompt_and_costs_no_round_trip(model: Path) -> None:
    """On warm links of 50 ms one way, the first token takes one traversal of the ring: four legs."""

    async def run() -> tuple[float | None, list[Recorded]]:
        async with world(WorldConfig(model=model, cuts=(2, 4), shape=LinkShape(delay_s=0.05))) as made:
            await ids_of(made)
            del made.log[:]
            generation = made.swarm.generate(PROMPT, FP32)
            await generation.text()
            return generation.stats.ttft_s, made.log

    ttft_s, log = run_virtual(run())
    assert ttft_s == pytest.approx(4 * 0.05, abs=0.005)
    assert [type(event.message) for event in log if event.sender == log[0].sender][:2] == [Open, Window]
    assert sum(isinstance(event.message, Open) for event in log) == 3
    assert sum(isinstance(event.message, Attach) for event in log) == 2


def test_one_token_costs_one_traversal_of_the_ring(model: Path) -> None:
    async def run() -> list[float]:
        async with world(WorldConfig(model=model, cuts=(2, 4), shape=LinkShape(delay_s=0.05))) as made:
            generation = made.swarm.generate(PROMPT, FP32)
            await generation.text()
            return generation.stats.inter_token_s

    times_s = run_virtual(run())
    assert len(times_s) == 23
    assert all(time_s == pytest.approx(4 * 0.05, abs=0.002) for time_s in times_s)


def test_stages_report_what_they_did_and_leases_return_to_zero(model: Path) -> None:
    async def run() -> None:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            generation = made.swarm.generate(PROMPT, FP32)
            async for _ in generation:
                assert made.kv_in_use()[0] == len(PROMPT) + 24
            assert generation.finish_reason == "length"
            stats = generation.stats
            assert [stage.layers.start for stage in stats.stages] == [0, 2, 4]
            assert stats.bytes_per_token()["between_stages_max"] == pytest.approx(128 * 4, abs=100)
            await made.settle()

    run_virtual(run())


def test_sessions_share_the_nodes_and_each_generates_as_when_alone(model: Path) -> None:
    prompts = [PROMPT[: 5 + 4 * n] for n in range(5)]

    async def run() -> tuple[list[list[int]], list[list[int]]]:
        async with world(WorldConfig(model=model, cuts=(3,), kv_tokens=512)) as made:
            alone = [await ids_of(made, FP32, prompt) for prompt in prompts]
            together = await asyncio.gather(*(ids_of(made, FP32, prompt) for prompt in prompts))
            await made.settle()
            return alone, together

    alone, together = run_virtual(run())
    assert alone == together


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model: Path) -> None:
    def sampled(seed: int) -> GenerateOptions:
        sampling = SamplingOptions(temperature=0.9, top_p=0.95, seed=seed)
        return GenerateOptions(max_tokens=24, codecs=("fp32",), ignore_eos=True, sampling=sampling)

    async def run(cuts: tuple[int, ...]) -> list[list[int]]:
        async with world(WorldConfig(model=model, cuts=cuts)) as made:
            return [await ids_of(made, sampled(seed)) for seed in (1, 1, 2)]

    first, again, other = run_virtual(run((2, 4)))
    assert first == again != other
    assert run_virtual(run((3,)))[0] == first


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_lossy_codecs_carry_a_generation(model: Path, codec: str) -> None:
    async def run() -> int:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            return len(await ids_of(made, GenerateOptions(max_tokens=8, codecs=(codec,), ignore_eos=True)))

    assert run_virtual(run()) == 8


def test_leaving_the_iteration_cancels_it_at_every_stage(model: Path) -> None:
    async def run() -> None:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            async for _ in made.swarm.generate(PROMPT, FP32):
                break
            await made.settle()
            assert len(await ids_of(made)) == 24

    run_virtual(run())


def test_aclose_ends_the_iteration_elsewhere(model: Path) -> None:
    async def run() -> str | None:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            generation = made.swarm.generate(PROMPT, FP32)
            count = 0
            async for _ in generation:
                count += 1
                if count == 3:
                    await generation.aclose()
            assert count < 24
            await made.settle()
            return generation.finish_reason

    assert run_virtual(run()) == "cancelled"


def test_aclose_frees_the_stages_though_nobody_iterates_on(model: Path) -> None:
    async def run() -> None:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            generation = made.swarm.generate(PROMPT, FP32)
            tokens = aiter(generation)
            await anext(tokens)
            await generation.aclose()
            await made.settle()

    run_virtual(run())


def test_a_generation_that_is_over_holds_no_lease_while_nobody_reads_it(model: Path) -> None:
    async def run() -> None:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            options = GenerateOptions(max_tokens=1, codecs=("fp32",), ignore_eos=True)
            generation = made.swarm.generate(PROMPT, options)
            tokens = aiter(generation)
            await anext(tokens)
            await made.settle()
            assert [token.id is not None async for token in tokens] == []
            assert generation.finish_reason == "length"

    run_virtual(run())


def test_a_full_node_is_gone_round_where_another_serves_the_same_layers(model: Path) -> None:
    async def run() -> None:
        config = WorldConfig(model=model, cuts=(3,), replicas=2, kv_tokens=100)
        async with world(config) as made:
            held = [aiter(made.swarm.generate(PROMPT, FP32)), aiter(made.swarm.generate(PROMPT, FP32))]
            for tokens in held:
                await anext(tokens)
            assert all(made.kv_in_use())
            for tokens in held:
                await tokens.aclose()
            await made.settle()

    run_virtual(run())


def test_a_node_that_died_unnoticed_is_gone_round(model: Path) -> None:
    async def run() -> None:
        async with world(WorldConfig(model=model, cuts=(3,), replicas=2)) as made:
            made.network.crash(made.nodes[0].node_id)
            made.network.crash(made.nodes[3].node_id)
            assert len(await ids_of(made)) == 24
            assert len(await ids_of(made)) == 24

    run_virtual(run())


def test_two_stages_that_cannot_reach_each_other_any_more_are_both_named(model: Path) -> None:
    async def run() -> FarflungError:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            started = asyncio.Event()
            task = asyncio.create_task(fails(made, started))
            await started.wait()
            first, second = made.nodes[0].node_id, made.nodes[1].node_id
            made.network.cut(first, second)
            made.network.silence(first, second)
            error = await task
            await made.settle()
            assert first[:8] in error.message
            assert second[:8] in error.message
            return error

    assert isinstance(run_virtual(run()), StageLost)


async def fails(made: World, break_it: asyncio.Event | None = None, options: GenerateOptions = FP32) -> FarflungError:
    try:
        async for _ in made.swarm.generate(PROMPT, options):
            if break_it is not None:
                break_it.set()
    except FarflungError as error:
        return error
    raise AssertionError("the generation did not fail")


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_node_that_dies_mid_generation_is_named_at_once_and_the_others_free_their_leases(model: Path, victim: int) -> None:
    async def run() -> tuple[FarflungError, float, str]:
        loop = asyncio.get_running_loop()
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            started = asyncio.Event()
            task = asyncio.create_task(fails(made, started))
            await started.wait()
            at_s = loop.time()
            made.network.crash(made.nodes[victim].node_id)
            error = await task
            took_s = loop.time() - at_s
            await made.settle(12)  # the victim waits ten seconds for its owner
            return error, took_s, made.nodes[victim].node_id

    error, took_s, node_id = run_virtual(run())
    assert isinstance(error, StageLost)
    assert node_id[:8] in error.message
    assert error.hint
    assert took_s < 2


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_node_that_falls_silent_is_given_up_within_ten_seconds(model: Path, victim: int) -> None:
    async def run() -> tuple[FarflungError, float]:
        loop = asyncio.get_running_loop()
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            started = asyncio.Event()
            task = asyncio.create_task(fails(made, started))
            await started.wait()
            at_s = loop.time()
            everyone = [node.node_id for node in made.nodes] + [made.driver_id]
            for other in everyone:
                if other != made.nodes[victim].node_id:
                    made.network.silence(made.nodes[victim].node_id, other)
            error = await task
            took_s = loop.time() - at_s
            await made.settle(12)  # the victim waits ten seconds for its owner
            return error, took_s

    error, took_s = run_virtual(run())
    assert isinstance(error, StageLost)
    assert took_s < 10


def test_missing_layers_are_named_with_the_command_that_adds_them(model: Path) -> None:
    async def run() -> FarflungError:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            await made.nodes[1].drain()
            await asyncio.sleep(0.2)  # the driver hears of it
            return await fails(made)

    error = run_virtual(run())
    assert isinstance(error, LayersMissing)
    assert "2:4" in error.message
    assert "--layers 2:4" in error.hint


def test_a_node_without_kv_left_refuses_and_says_what_is_free(model: Path) -> None:
    async def run() -> FarflungError:
        async with world(WorldConfig(model=model, cuts=(2, 4), kv_tokens=100)) as made:
            holding = made.swarm.generate(PROMPT, FP32)
            async for _ in holding:
                return await fails(made)
        raise AssertionError("nothing was generated")

    error = run_virtual(run())
    assert isinstance(error, SessionRefused | LayersMissing)
    assert "36" in error.message


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_sent(model: Path) -> None:
    async def run() -> None:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            del made.log[:]
            with pytest.raises(PromptTooLong):
                made.swarm.generate([5] * 511, GenerateOptions(max_tokens=2))
            with pytest.raises(UsageError):
                made.swarm.generate([], FP32)
            assert made.log == []

    run_virtual(run())


def test_a_draining_node_lets_its_sessions_end_and_takes_no_more(model: Path) -> None:
    async def run() -> None:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            started = asyncio.Event()

            async def whole() -> int:
                count = 0
                async for _ in made.swarm.generate(PROMPT, FP32):
                    started.set()
                    count += 1
                return count

            running = asyncio.create_task(whole())
            await started.wait()
            draining = asyncio.create_task(made.nodes[1].drain())
            await asyncio.sleep(0.1)
            assert isinstance(await fails(made), LayersMissing | SessionRefused | StageLost | Cancelled)
            assert await running == 24
            await draining

    run_virtual(run())

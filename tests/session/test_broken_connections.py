"""Every link is cut and comes again at random during one generation: no token changes, and no session begins anew."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from local_nodes import add_tokenizer, local_swarm
from models import tiny_model, whole_model
from virtual_swarm import World, WorldConfig, world

from farflung.core.errors import LinkLost
from farflung.core.messages import Report
from farflung.core.sampling import SamplingOptions
from farflung.lab.virtual_clock import run_virtual
from farflung.node.service import Node
from farflung.node.stage_session import StageSession
from farflung.session.generation import Generation
from farflung.session.options import GenerateOptions
from farflung.session.swarm import Swarm
from farflung.transport.link import LinkConfig
from farflung.transport.memory import LinkShape

PROMPT = tuple(range(5, 45))
LONG_PROMPT = tuple(5 + n % 90 for n in range(280))
CUTS = 50


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(tiny_model("llama", tmp_path_factory.mktemp("llama"), layers=6))


def options(max_tokens: int, **changes: object) -> GenerateOptions:
    base: dict[str, object] = {"codecs": ("fp32",), "ignore_eos": True, "chunk_tokens": 16, "max_tokens": max_tokens}
    return GenerateOptions(**(base | changes))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One generation under fire.

    Attributes:
        prompt, options: of the generation.
        pause_s: the longest time between two cuts.
        silent_s: a cut is not told to either end and lasts so long; 0: it resets the link.
        cuts: how many.
        shape: of all paths.
    """

    options: GenerateOptions
    prompt: tuple[int, ...] = PROMPT
    pause_s: float = 0.25
    silent_s: float = 0.0
    cuts: int = CUTS
    shape: LinkShape = field(default_factory=lambda: LinkShape(delay_s=0.01, jitter_s=0.002, rate_bytes_per_s=12.5e6))


@dataclass
class Outcome:
    """What a generation gave, and what the stages looked like meanwhile."""

    tokens: list[int] = field(default_factory=list)
    cuts: int = 0
    reconnects: int = 0
    sessions: set[StageSession] = field(default_factory=set)
    leases: set[tuple[int, ...]] = field(default_factory=set)


def uncut(model: Path, trial: Trial) -> list[int]:
    async def run() -> list[int]:
        async with world(WorldConfig(model=model, cuts=(2, 4), kv_tokens=512)) as made:
            return [token.id async for token in made.swarm.generate(trial.prompt, trial.options) if token.id is not None]

    return run_virtual(run())


def under_fire(model: Path, trial: Trial, seed: int) -> Outcome:
    async def run() -> Outcome:
        config = WorldConfig(model=model, cuts=(2, 4), kv_tokens=512, seed=seed, shape=trial.shape)
        async with world(config) as made:
            outcome = Outcome()
            generation = made.swarm.generate(trial.prompt, trial.options)
            firing = asyncio.create_task(fire(made, generation, trial, Random(seed), outcome))
            async for token in generation:
                if token.id is not None:
                    outcome.tokens.append(token.id)
            firing.cancel()
            await asyncio.wait([firing])
            assert firing.cancelled() or firing.exception() is None
            outcome.reconnects = generation.stats.reconnects
            await made.settle()
            assert all(session.log is None or session.log.memory == 0 for session in outcome.sessions)
            check_digests(made)
            return outcome

    return run_virtual(run())


async def fire(made: World, generation: Generation, trial: Trial, random: Random, outcome: Outcome) -> None:
    """Cuts one of the five links at a time."""
    stages = [node.node_id for node in made.nodes]
    links = [*((made.driver_id, stage) for stage in stages), *pairwise(stages)]
    while outcome.cuts < trial.cuts and generation.finish_reason is None:
        await asyncio.sleep(random.random() * trial.pause_s)
        if not all(node.table.sessions for node in made.nodes):
            continue  # not open at every stage yet
        outcome.sessions.update(session for node in made.nodes for session in node.table.sessions)
        outcome.leases.add(tuple(made.kv_in_use()))
        link = random.choice(links)
        if trial.silent_s:
            made.network.silence(*link)
            await asyncio.sleep(trial.silent_s)
            made.network.heal(*link)
        else:
            made.network.cut(*link)
        outcome.cuts += 1


def check_digests(made: World) -> None:
    """Both ends of every edge saw the same committed rows."""
    reports = {event.sender: event.message for event in made.log if isinstance(event.message, Report)}
    for left, right in pairwise(reports.get(node.node_id) for node in made.nodes):
        if left is not None and right is not None and left.committed_tokens == right.committed_tokens:
            assert left.digest_out == right.digest_in


def check(outcome: Outcome, trial: Trial, expected: list[int]) -> None:
    lease = len(trial.prompt) + trial.options.max_tokens
    assert outcome.tokens == expected
    assert outcome.cuts == trial.cuts, "it was over before the last cut"
    assert outcome.reconnects > 0
    assert len(outcome.sessions) == 3, "a session began anew"
    assert outcome.leases == {(lease,) * 3}


SEEDS = [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_link_cut_and_restored_at_random_fifty_times_changes_no_token(model: Path, seed: int) -> None:
    trial = Trial(options=options(200))
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        whole = whole_model(model).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False, eos_token_id=None
        )
    check(under_fire(model, trial, seed), trial, [int(token) for token in whole[0, len(PROMPT) :]])


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_cuts_while_a_long_prompt_crosses_slow_links_change_no_token(model: Path, seed: int) -> None:
    slow = LinkShape(delay_s=0.03, jitter_s=0.005, rate_bytes_per_s=100e3)
    trial = Trial(options=options(60), prompt=LONG_PROMPT, pause_s=0.4, shape=slow)
    check(under_fire(model, trial, seed), trial, uncut(model, trial))


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_cuts_change_no_token_where_sampling_looks_back_at_the_text(model: Path, seed: int) -> None:
    sampling = SamplingOptions(temperature=0.9, top_p=0.95, repetition_penalty=1.3, frequency_penalty=0.4, seed=7)
    trial = Trial(options=options(200, sampling=sampling))
    expected = uncut(model, trial)
    assert expected != uncut(model, Trial(options=options(200, sampling=SamplingOptions(temperature=0.9, top_p=0.95, seed=7))))
    check(under_fire(model, trial, seed), trial, expected)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_links_that_fall_silent_for_longer_than_they_live_change_no_token(model: Path, seed: int) -> None:
    far = LinkShape(delay_s=0.05, jitter_s=0.01, rate_bytes_per_s=12.5e6)
    trial = Trial(options=options(120), silent_s=LinkConfig().dead_after_s + 1.5, cuts=5, shape=far)
    check(under_fire(model, trial, seed), trial, uncut(model, trial))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_generation_that_is_cancelled_between_cuts_leaves_nothing_behind(model: Path, seed: int) -> None:
    async def run() -> None:
        trial = Trial(options=options(200), pause_s=0.1)
        async with world(WorldConfig(model=model, cuts=(2, 4), kv_tokens=512, seed=seed)) as made:
            outcome = Outcome()
            generation = made.swarm.generate(trial.prompt, trial.options)
            firing = asyncio.create_task(fire(made, generation, trial, Random(seed), outcome))
            async for _ in generation:
                if outcome.cuts >= 10:
                    break
            await generation.aclose()
            await made.settle(15)  # a stage that does not hear of it waits ten seconds for its owner
            firing.cancel()
            await asyncio.wait([firing])
            assert len(outcome.sessions) == 3
            assert all(session.log is None or session.log.memory == 0 for session in outcome.sessions)

    run_virtual(run())


# -- real sockets --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tcp_links_that_end_at_random_change_no_token(model: Path) -> None:
    """The same over TLS, sockets, HTTP and compute threads: links of the nodes and the driver end from inside."""

    async def run() -> tuple[list[int], list[int]]:
        asked = options(150)
        async with AsyncExitStack() as stack:
            nodes = list[Node]()
            url = await stack.enter_async_context(local_swarm(model, (2, 4), nodes))
            swarm = await stack.enter_async_context(Swarm.connect(url, str(model)))
            expected = [token.id async for token in swarm.generate(PROMPT, asked) if token.id is not None]
            random, found, ended = Random(1), list[int](), 0
            generation = swarm.generate(PROMPT, asked)
            async for token in generation:
                if token.id is not None:
                    found.append(token.id)
                links = [link for node in nodes for link in node.table.pool.links]
                if len(found) % 6 == 0 and links:
                    random.choice(links).end(LinkLost("this test pulled the plug"))
                    ended += 1
            assert ended >= 20
            assert generation.stats.reconnects > 0
            return found, expected

    found, expected = asyncio.run(run())
    assert found == expected

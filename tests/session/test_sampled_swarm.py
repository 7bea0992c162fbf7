"""Sampling through a whole swarm: the tail of three stages knows the text, and nothing beside a session changes its tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_model, whole_model
from plain_sampling import token_after
from virtual_swarm import World, WorldConfig, world

from farflung.core.errors import SessionRefused
from farflung.core.sampling import SamplingOptions
from farflung.lab.virtual_clock import run_virtual
from farflung.session.generation import Token
from farflung.session.options import GenerateOptions

PROMPT = (5, 6, 7, 8, 5, 5, 9, 40, 41, 42)
TOKENS = 16
PENALISED = SamplingOptions(
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.3,
    presence_penalty=0.3,
    frequency_penalty=0.4,
    logit_bias=((6, 1.5), (5, -100.0)),
    seed=21,
    logprobs=3,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), layers=6)


async def tokens_of(made: World, sampling: SamplingOptions, prompt: tuple[int, ...] = PROMPT) -> list[Token]:
    options = GenerateOptions(max_tokens=TOKENS, codecs=("fp32",), ignore_eos=True, chunk_tokens=4, sampling=sampling)
    return [token async for token in made.swarm.generate(prompt, options) if token.id is not None]


def test_three_stages_sample_what_the_whole_model_and_plain_sampling_do(model: Path) -> None:
    async def run() -> list[Token]:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            return await tokens_of(made, PENALISED)

    found = run_virtual(run())
    whole, output = whole_model(model), []
    for token in found:
        with torch.inference_mode():
            row = whole(torch.tensor([[*PROMPT, *output]])).logits[0, -1].float().numpy()
        expected = token_after(row, PENALISED, len(PROMPT) + len(output), PROMPT, output)
        assert token.id == expected
        likely = torch.log_softmax(torch.from_numpy(row.astype(np.float64)), 0)
        assert token.logprob is not None
        assert token.logprob.logprob == pytest.approx(float(likely[expected]), abs=1e-4)
        assert [other for other, _ in token.logprob.top] == torch.topk(likely, 3).indices.tolist()
        output.append(expected)
    assert len(output) == TOKENS
    assert 5 not in output


def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch(model: Path) -> None:
    others = [
        SamplingOptions(),
        SamplingOptions(temperature=1.0, seed=1),
        SamplingOptions(temperature=1.5, top_p=0.8, presence_penalty=1.0, seed=2),
    ]

    async def run() -> tuple[list[list[Token]], list[list[Token]]]:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            prompts = [(PENALISED, PROMPT), *((sampling, PROMPT[:count]) for count, sampling in enumerate(others, start=3))]
            alone = [await tokens_of(made, *each) for each in prompts]
            return alone, list(await asyncio.gather(*(tokens_of(made, *each) for each in prompts)))

    alone, together = run_virtual(run())
    assert [[token.id for token in text] for text in together] == [[token.id for token in text] for text in alone]
    assert [token.logprob is not None for text in together for token in text] == [True] * TOKENS + [False] * TOKENS * len(
        others
    )


def test_a_bias_on_a_token_that_the_vocabulary_lacks_is_refused_at_the_opening(model: Path) -> None:
    async def run() -> None:
        async with world(WorldConfig(model=model, cuts=(2, 4))) as made:
            with pytest.raises(SessionRefused, match="token 100000, the vocabulary has"):
                await tokens_of(made, SamplingOptions(logit_bias=((100_000, 1.0),)))
            await made.settle()

    run_virtual(run())

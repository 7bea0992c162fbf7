"""Real sockets: TLS links, an HTTP directory, compute threads; the driver from ``async`` code and without."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from local_nodes import add_tokenizer, served
from models import tiny_model, whole_model

from farflung.core.errors import DigestMismatch, DirectoryUnreachable, LayersMissing, NoSuchModel, UsageError
from farflung.session import GenerateOptions, Swarm
from farflung.session.sync import connect

FP32 = GenerateOptions(max_tokens=16, codecs=("fp32",), ignore_eos=True)
PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(tiny_model("qwen2", tmp_path_factory.mktemp("qwen2"), layers=6))


@pytest.fixture(scope="module")
def directory_url(model: Path) -> Iterator[str]:
    with served(model, cuts=(2, 4)) as url:
        yield url


def greedy(model: Path) -> list[int]:
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        out = whole_model(model).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
    return [int(token) for token in out[0, len(PROMPT) :]]


def test_over_tls_three_stages_generate_what_the_whole_model_does(model: Path, directory_url: str) -> None:
    async def run() -> list[int | None]:
        async with Swarm.connect(directory_url, str(model)) as swarm:
            return [token.id async for token in swarm.generate(PROMPT, FP32) if token.id is not None]

    assert asyncio.run(run()) == greedy(model)


def test_the_driver_costs_at_most_200_bytes_a_token(model: Path, directory_url: str) -> None:
    options = GenerateOptions(max_tokens=100, codecs=("int8",), ignore_eos=True)

    async def run() -> tuple[float, float]:
        async with Swarm.connect(directory_url, str(model)) as swarm:
            await swarm.generate(PROMPT, options).text()
            generation = swarm.generate(PROMPT, options)
            await generation.text()
            per_token = generation.stats.bytes_per_token()
            assert per_token["between_stages_max"] <= 1.06 * 128 + 100
            return per_token["driver_up"], per_token["driver_down"]

    up, down = asyncio.run(run())
    assert up + down <= 200


def test_without_async_the_same_text_comes_out(model: Path, directory_url: str) -> None:
    with connect(directory_url, str(model)) as swarm:
        generation = swarm.generate("the fox", FP32)
        text = "".join(token.text for token in generation)
        assert text == generation.stats.text
        assert generation.finish_reason == "length"
        assert swarm.generate("the fox", FP32).text() == text
        for _ in swarm.generate("the fox", FP32):
            break
        with pytest.raises(UsageError):
            generation.text()


def test_stop_strings_end_the_text_before_them(model: Path, directory_url: str) -> None:
    with connect(directory_url, str(model)) as swarm:
        whole = swarm.generate("the fox", FP32).text()
        middle = whole[len(whole) // 2 : len(whole) // 2 + 2]
        generation = swarm.generate(
            "the fox", GenerateOptions(max_tokens=16, codecs=("fp32",), ignore_eos=True, stop=(middle,))
        )
        assert generation.text() == whole[: whole.index(middle)]
        assert generation.finish_reason == "stop"


def test_another_model_than_the_one_served_is_refused_by_digest(model: Path, directory_url: str, tmp_path: Path) -> None:
    other = add_tokenizer(tiny_model("qwen2", tmp_path / model.name, layers=6, seed=1))
    with connect(directory_url, str(other)) as swarm, pytest.raises(DigestMismatch):
        swarm.generate(PROMPT, FP32).text()


def test_a_model_nobody_serves_is_named(directory_url: str, tmp_path: Path) -> None:
    other = add_tokenizer(tiny_model("llama", tmp_path / "unknown", layers=2))
    with connect(directory_url, str(other)) as swarm, pytest.raises((NoSuchModel, LayersMissing), match="unknown"):
        swarm.generate(PROMPT, FP32).text()


def test_a_directory_that_is_not_there_is_an_error_within_three_seconds(model: Path) -> None:
    with pytest.raises(DirectoryUnreachable), connect("http://127.0.0.1:9", str(model)):
        pass

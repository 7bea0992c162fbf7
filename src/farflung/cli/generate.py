"""``farflung generate``: one completion, streamed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from farflung.cli.admission import IdentityFile, SwarmKeyOption
from farflung.cli.choices import check_speculation, parse_codecs
from farflung.cli.driving import Driver
from farflung.cli.options import (
    DEFAULT_DIRECTORY,
    Codec,
    Debug,
    Directory,
    Json,
    MaxTokens,
    Model,
    examples,
)
from farflung.cli.output import Output, command
from farflung.cli.sampling import (
    FrequencyPenalty,
    LogitBias,
    Logprobs,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    sampling_of,
)
from farflung.cli.stopping import cancelled_by_sigterm

if TYPE_CHECKING:
    from farflung.session import GenerateOptions

app = typer.Typer()


@app.command(
    epilog=examples(
        'farflung generate -m gemma3-270m "The capital of France is"',
        "farflung generate -m gemma3-270m --temperature 0.8 --seed 7 - < prompt.txt",
        'farflung generate -m gemma3-270m --temperature 1 --min-p 0.05 --repetition-penalty 1.1 "Once upon a time"',
        'farflung generate -m gemma3-270m --json --logprobs 5 "2 + 2 =" | jq .logprobs',
        'farflung generate -m gemma3-270m --json "Once upon a time" | jq .decode_tokens_per_s',
    )
)
def generate(
    *,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; '-' reads it from stdin.")],
    directory: Directory = DEFAULT_DIRECTORY,
    model: Model,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    seed: Seed = 0,
    logprobs: Logprobs = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end-of-text token.")] = False,
    codec: Codec = "int8",
    speculate: Annotated[str, typer.Option("--speculate", help="Guess tokens ahead: not built yet, auto is off.")] = "auto",
    swarm_key: SwarmKeyOption = "",
    identity: IdentityFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue PROMPT over the nodes of a swarm and stream the text.

    The text goes to stdout; speed and the summary go to stderr, so the text can be piped on.
    """
    with command(json=json, debug=debug) as out:
        from farflung.cli.generation import read_prompt
        from farflung.session import GenerateOptions

        check_speculation(speculate)
        codecs = parse_codecs(codec)
        sampling = sampling_of(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            seed=seed,
            logprobs=logprobs,
        )
        options = GenerateOptions(
            max_tokens=max_tokens,
            sampling=sampling,
            stop=tuple(stop or ()),
            codecs=codecs,
            ignore_eos=ignore_eos,
        )
        driver = Driver(directory=directory, model=model, swarm_key=swarm_key, identity=identity)
        asyncio.run(_generate(out, driver, read_prompt(prompt), options))


async def _generate(out: Output, driver: Driver, prompt: str, options: GenerateOptions) -> None:
    from farflung.cli.generation import as_json, headline, stream, summary

    async with cancelled_by_sigterm(), driver.connect() as swarm:
        generation = swarm.generate(prompt, options)
        tokens = await stream(out, generation, prompt if out.live else "")
        out.json(as_json(generation, tokens))
        out.note(summary(generation.stats))
        out.note(headline(generation.stats))

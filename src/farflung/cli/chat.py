"""``farflung chat``: a conversation in the terminal.

The links live on an event loop in a thread of its own, so they stay warm while the main thread waits for a person to type; the
main thread is where line editing and Ctrl-C work on every platform.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
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
from farflung.core.errors import FarflungError

if TYPE_CHECKING:
    from farflung.session import GenerateOptions, Swarm
    from farflung.session.loop_thread import LoopThread

app = typer.Typer()

HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer"

Message = dict[str, str]


@app.command(
    epilog=examples(
        "farflung chat -m qwen2.5-coder-0.5b",
        'farflung chat -m qwen2.5-coder-0.5b --system "Answer in one sentence."',
        "echo 'What is a monad?' | farflung chat -m qwen2.5-coder-0.5b",
    )
)
def chat(
    *,
    directory: Directory = DEFAULT_DIRECTORY,
    model: Model,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="Instructions before the conversation.")] = "",
    max_tokens: MaxTokens = 512,
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
    codec: Codec = "int8",
    speculate: Annotated[str, typer.Option("--speculate", help="Guess tokens ahead: not built yet, auto is off.")] = "auto",
    swarm_key: SwarmKeyOption = "",
    identity: IdentityFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk with an instruct model over the nodes of a swarm; it remembers what was said.

    /reset forgets the conversation, /exit (or the end of input) leaves. Ctrl-C stops a running answer; at the prompt it leaves.
    With piped input every line is one message.
    """
    with command(json=json, debug=debug) as out:
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
        options = GenerateOptions(max_tokens=max_tokens, sampling=sampling, codecs=codecs)
        driver = Driver(directory=directory, model=model, swarm_key=swarm_key, identity=identity)
        from farflung.session.loop_thread import LoopThread

        with LoopThread() as loop, loop.holding(driver.connect()) as swarm:
            _converse(out, loop, swarm, options, [{"role": "system", "content": system}] if system else [])


def _converse(out: Output, loop: LoopThread, swarm: Swarm, options: GenerateOptions, opening: list[Message]) -> None:
    messages = list(opening)
    interactive = sys.stdin.isatty()
    if interactive:
        out.note(f"{swarm.spec.name}; {HELP}")
    for line in _lines(interactive):
        text = line.strip()
        if text == "/exit":
            return
        if text == "/reset":
            messages = list(opening)
            out.note("forgotten")
        elif text in ("/help", "/?"):
            out.note(HELP)
        elif text:
            try:
                answer = loop.run(_answer(out, swarm, [*messages, {"role": "user", "content": text}], options))
            except KeyboardInterrupt:
                out.note("\n(stopped)")
                continue
            except FarflungError as error:
                if not interactive:
                    raise
                out.error(error)
                continue
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def _lines(interactive: bool) -> Iterator[str]:
    """What the person types, or the lines of a pipe."""
    if not interactive:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # Windows has its own line editing
        import readline  # noqa: F401 - input() uses it once it is imported
    while True:
        try:
            yield input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return


async def _answer(out: Output, swarm: Swarm, messages: list[Message], options: GenerateOptions) -> str:
    from farflung.cli.generation import as_json, headline, stream

    generation = swarm.chat(messages, options)
    tokens = await stream(out, generation)
    out.json({"role": "assistant", **as_json(generation, tokens)})
    if out.live:
        from rich.text import Text

        out.note(Text(headline(generation.stats), style="dim"))
    return generation.stats.text

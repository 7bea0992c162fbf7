"""Options that choose how tokens are sampled: how they read on a command line, and what they become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from farflung.core.errors import UsageError

if TYPE_CHECKING:
    from farflung.core.sampling import SamplingOptions
    from farflung.session import Token

Temperature = Annotated[float, typer.Option("--temperature", min=0.0, max=100.0, help="0 always takes the likeliest token.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Sample from this many of the likeliest tokens; 0 from all.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from the likeliest tokens of this total share; above 0.")
]
MinP = Annotated[
    float, typer.Option("--min-p", min=0.0, max=1.0, help="Leave out tokens less likely than this share of the likeliest one.")
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty", min=0.01, max=100.0, help="Above 1: tokens of the prompt or the output come less often."
    ),
]
PresencePenalty = Annotated[
    float,
    typer.Option("--presence-penalty", min=-2.0, max=2.0, help="Taken from the logit of tokens that were put out before."),
]
FrequencyPenalty = Annotated[
    float, typer.Option("--frequency-penalty", min=-2.0, max=2.0, help="The same, once for each time they were put out.")
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option("--logit-bias", metavar="ID=BIAS", help="Added to the logit of a token, -100 to 100; repeatable."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same text.")]
Logprobs = Annotated[
    int | None,
    typer.Option("--logprobs", min=0, max=20, help="With --json: each token's log-probability and those of this many others."),
]


def sampling_of(
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    logit_bias: Sequence[str] | None,
    seed: int,
    logprobs: int | None,
) -> SamplingOptions:
    """What the options above become. Raises UsageError for values that are out of range."""
    from farflung.core.sampling import SamplingOptions

    return SamplingOptions(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=parse_logit_bias(logit_bias or ()),
        seed=seed,
        logprobs=logprobs,
    )


def parse_logit_bias(pairs: Sequence[str]) -> tuple[tuple[int, float], ...]:
    """(token id, bias) of each ``ID=BIAS``. Raises UsageError for what is neither."""
    found = []
    for pair in pairs:
        token, equals, bias = pair.partition("=")
        try:
            if not (equals and token.isdecimal()):
                raise ValueError
            found.append((int(token), float(bias)))
        except ValueError:
            raise UsageError(
                f"--logit-bias {pair!r} is no ID=BIAS", hint="write a token id and a number, e.g. 1234=-5"
            ) from None
    return tuple(found)


def logprobs_as_json(tokens: Sequence[Token]) -> list[dict[str, object]]:
    """One object for each token that came with its log-probability."""
    return [
        {
            "id": token.id,
            "logprob": token.logprob.logprob,
            "top": [{"id": other, "logprob": logprob} for other, logprob in token.logprob.top],
        }
        for token in tokens
        if token.logprob is not None
    ]

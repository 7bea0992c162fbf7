"""``farflung bench``: how fast this machine is."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from farflung.cli.choices import check_dtype, quantised, torch_dtype
from farflung.cli.node import prepare_environment
from farflung.cli.options import Debug, Json, Model, examples
from farflung.cli.output import command

app = typer.Typer(name="bench", no_args_is_help=True, help="How fast this machine is.")


@app.callback()
def bench() -> None:
    """How fast this machine is."""


@app.command(
    epilog=examples(
        "farflung bench stage --model gemma3-270m",
        "farflung bench stage --model gemma3-270m --layers 0:6 --threads 1 --json | jq .ratio",
    )
)
def stage(
    *,
    model: Model,
    layers: Annotated[str, typer.Option("--layers", metavar="A:B", help="Layers A to B-1; all of them without it.")] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="Precision of the weights: auto, fp32, bf16, int8 or int4.")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=0, help="Compute threads; 0 takes one per core.")] = 0,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Computed before decoding.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Decoded in each repeat.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Turns of each side; medians are compared.")] = 3,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a stage on this machine beside plain transformers: same weights, threads and run.

    Prints the T-curve (milliseconds of a step by its number of tokens) and the decode speed of both. Compare ratios: what else
    the machine does falls on both sides.
    """
    with command(json=json, debug=debug) as out:
        check_dtype(dtype)
        prepare_environment(threads, os.environ)
        from farflung.core.model import LayerRange
        from farflung.engine.bench import StageBenchConfig, bench_stage
        from farflung.engine.open_model import open_source

        config = StageBenchConfig(
            layers=LayerRange.parse(layers) if layers else None,
            dtype=torch_dtype(dtype),
            quantised=quantised(dtype),
            threads=threads or None,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
        )
        with out.progress(f"measuring {model}") as progress:
            found = bench_stage(open_source(model, progress=progress), config, progress=progress)
        out.json(found)
        curve = "  ".join(f"{tokens}: {ms:.1f} ms" for tokens, ms in found["t_curve_ms"].items())
        out.print(f"a step of so many tokens takes   {curve}")
        out.print(
            f"decode {found['decode_tokens_per_s']:.1f} tokens/s, plain transformers {found['reference_tokens_per_s']:.1f}: "
            f"{found['ratio']:.2f} times"
        )
        out.print(f"prefill {found['prefill_tokens_per_s']:.0f} tokens/s")

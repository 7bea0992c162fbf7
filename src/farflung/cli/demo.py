"""``farflung demo``: a real model over several processes of this machine, in one command.

    this process --starts--> directory, node 1 .. node N, plain transformers (for the comparison)
    this process --drives--> one generation over the nodes

All children end with this process (``cli.processes``), and nothing is kept: nodes use keys that they forget.
"""

from __future__ import annotations

import asyncio
import json as json_format
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farflung.cli.options import Debug, Json, MaxTokens, examples
from farflung.cli.output import Output, command
from farflung.cli.processes import Child, Processes, processes
from farflung.cli.stopping import cancelled_by_sigterm
from farflung.core.errors import Cancelled, UsageError
from farflung.core.ids import short

if TYPE_CHECKING:
    from farflung.session import Generation

app = typer.Typer()

DEFAULT_MODEL = "gemma3-270m"
DEFAULT_PROMPT = "A distributed system is one in which"

START_TIMEOUT_S = 1800.0
"""For a node to load its layers: seconds, unless a hub model is downloaded first. A node that dies is seen at once."""

REFERENCE_TIMEOUT_S = 900.0
"""For plain transformers to load and generate in one process, at the lowest priority."""

LEASE_SPARE_TOKENS = 64

LOOPBACK = "127.0.0.1:0"

CHILD = ("--exit-with-stdin", "--json")


@app.command(
    epilog=examples(
        "farflung demo",
        'farflung demo --nodes 4 --max-tokens 128 --prompt "Once upon a time"',
        "farflung demo --model qwen2.5-coder-0.5b --json | jq .matches_single_process",
    )
)
def demo(
    *,
    model: Annotated[
        str,
        typer.Option("--model", "-m", metavar="MODEL", help="As everywhere; try a name of 'farflung models list'."),
    ] = DEFAULT_MODEL,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Processes that share the layers.")] = 3,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.")] = DEFAULT_PROMPT,
    max_tokens: MaxTokens = 64,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Compare with plain transformers in one process.")
    ] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a real model across several processes here, then compare with one process.

    Starts a directory and nodes that each hold a part of the layers, with encrypted links between them, lets them continue
    PROMPT, and checks the tokens against plain transformers. Everything is ended and removed afterwards.
    """
    with command(json=json, debug=debug) as out:
        options = DemoOptions(model=model, nodes=nodes, prompt=prompt, max_tokens=max_tokens, compare=compare)
        asyncio.run(_demo(out, options))


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the command line says."""

    model: str
    nodes: int
    prompt: str
    max_tokens: int
    compare: bool


async def _demo(out: Output, options: DemoOptions) -> None:
    if not options.prompt.strip():
        raise UsageError("the prompt is empty", hint="give some words to go on from with --prompt")
    async with cancelled_by_sigterm(), processes() as group:
        directory = await group.start("directory", ["farflung", "directory", "--listen", LOOPBACK, *CHILD])
        path = await _assembled(out, options.model)
        reference = await group.start("plain transformers", ["farflung.cli.demo_reference", path]) if options.compare else None
        tokenizer = await group.start("tokenizer", ["farflung", "models", "fetch", options.model, *CHILD])
        url = (await directory.event(START_TIMEOUT_S))["url"]
        stages = await _start_nodes(group, options, url)
        ready = await _all_ready(out, [*stages, tokenizer], f"{options.nodes} nodes, each a process, and the tokenizer")
        for child, event in zip(stages, ready, strict=False):
            start, stop = event["layers"]
            out.note(f"process {child.pid}: node {short(event['node_id'])} at {event['listen']}, layers {start}:{stop}")
        generation, request = await _generate(out, options, url)
        single = await _compare(out, reference, request)
        with out.status("ending all processes"):
            await group.end()
    _report(out, options, generation, [(event, child.pid) for event, child in zip(ready, stages, strict=False)], single)


async def _assembled(out: Output, model: str) -> str:
    """Joins the pieces of a built-in model; what to call the model for transformers."""
    from farflung.engine.catalog import CATALOG, assemble

    if model not in CATALOG:
        return model
    abandoned = threading.Event()
    with out.progress("weights") as progress:

        def report(what: str, done: int, total: int) -> None:
            if abandoned.is_set():
                raise Cancelled("given up")
            progress(what, done, total)

        try:
            return str(await asyncio.to_thread(assemble, CATALOG[model], progress=report))
        finally:
            abandoned.set()  # after Ctrl-C the thread ends with its next piece


async def _start_nodes(group: Processes, options: DemoOptions, url: str) -> list[Child]:
    """One node per part of the layers. fp32 throughout, so that every token can be compared."""
    lease = len(options.prompt.encode()) + options.max_tokens + LEASE_SPARE_TOKENS  # a token is at least a byte
    model = ["--directory", url, "--model", options.model, "--dtype", "fp32", "--codec", "fp32", "--kv-tokens", str(lease)]
    common = ["farflung", "node", *model, "--listen", LOOPBACK, "--ephemeral", *CHILD]
    return [
        await group.start(f"node {part}", [*common, "--layers", f"{part}/{options.nodes}"])
        for part in range(1, options.nodes + 1)
    ]


async def _all_ready(out: Output, children: list[Child], what: str) -> list[dict[str, Any]]:
    """The first event of each child; the first failure ends the wait for all."""
    with out.progress("starting", in_bytes=False) as progress:
        done = 0
        progress(what, done, len(children))

        async def ready(child: Child) -> dict[str, Any]:
            nonlocal done
            event = await child.event(START_TIMEOUT_S)
            done += 1
            progress(what, done, len(children))
            return event

        async with asyncio.TaskGroup() as tasks:
            waits = [tasks.create_task(ready(child)) for child in children]
    return [wait.result() for wait in waits]


async def _generate(out: Output, options: DemoOptions, url: str) -> tuple[Generation, dict[str, object]]:
    """The generation, run to its end, and what to ask plain transformers for."""
    from farflung.cli.generation import headline, stream, summary
    from farflung.session import GenerateOptions, Swarm

    async with Swarm.connect(url, options.model) as swarm:
        ids = swarm.tokenizer.encode(options.prompt)
        generation = swarm.generate(ids, GenerateOptions(max_tokens=options.max_tokens, codecs=("fp32",)))
        end_ids = sorted({*swarm.spec.eos_token_ids, *swarm.tokenizer.eos_token_ids})
        await stream(out, generation, options.prompt)
    out.note(summary(generation.stats))
    out.note(headline(generation.stats))
    return generation, {"prompt_ids": ids, "max_tokens": options.max_tokens, "end_ids": end_ids}


async def _compare(out: Output, reference: Child | None, request: dict[str, object]) -> list[int] | None:
    """What plain transformers generates from the same prompt."""
    if reference is None:
        return None
    with out.status("comparing: plain transformers is still reading the whole model in one process"):
        await reference.event(REFERENCE_TIMEOUT_S)
    with out.status("comparing: plain transformers continues the same prompt"):
        reference.send_line(json_format.dumps(request))
        answer = await reference.event(REFERENCE_TIMEOUT_S)
    return [int(token) for token in answer["token_ids"]]


def _report(
    out: Output,
    options: DemoOptions,
    generation: Generation,
    nodes: list[tuple[dict[str, Any], int]],
    single: list[int] | None,
) -> None:
    from farflung.cli.generation import as_json

    found = as_json(generation)
    stats = generation.stats
    matches = None if single is None else stats.token_ids == single
    compared = 0 if single is None else min(len(stats.token_ids), len(single))
    out.json(
        {
            "model": options.model,
            "nodes": [{"id": event["node_id"], "layers": event["layers"], "pid": pid} for event, pid in nodes],
            **{key: found[key] for key in ("text", "token_ids", "decode_tokens_per_s", "ttft_s", "bytes_per_token")},
            "prompt": options.prompt,
            "matches_single_process": matches,
            "tokens_compared": compared,
        }
    )
    if single is None:
        return
    if matches:
        out.print(f"matches_single_process: true ({compared} tokens compared with plain transformers)")
        return
    differs = next((i for i, (a, b) in enumerate(zip(stats.token_ids, single, strict=False)) if a != b), compared)
    out.print(f"matches_single_process: false (token {differs + 1} is the first to differ; {compared} compared)")

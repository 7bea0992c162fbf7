"""A ring of stages on this machine beside plain transformers in one process, in one run.

    python -m bench.loopback [--model qwen2.5-coder-0.5b] [--stages 4] [--json]

Real node processes (bf16, one compute thread each, int8 rows) over loopback TLS, and two processes of plain ``generate`` with
the same weights, one with one thread and one with two. They take turns, so that a machine whose speed drifts drifts for all.
Targets: the ring reaches >= 0.85 of one thread, >= 0.70 of two.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from typing import Any

PROMPT_TOKENS = 64
THREADS = (1, 2)
READY_S = 600.0


def serve_reference(model: str, threads: int) -> None:
    """The child: loads the whole model, then measures once per line it reads."""
    import torch

    from farflung.engine.bench import GenerateReference
    from farflung.engine.loader import load_stage
    from farflung.engine.open_model import open_source

    torch.set_num_threads(threads)
    source = open_source(model)
    reference = GenerateReference(load_stage(source, source.spec().all_layers, torch.bfloat16, attention=None))
    print(json.dumps({"event": "ready"}), flush=True)
    for line in sys.stdin:
        tokens = int(line)
        run = reference.run(PROMPT_TOKENS, tokens)
        print(json.dumps({"tokens_per_s": (tokens - 1) / run.decode_s}), flush=True)


async def measure(model: str, stages: int, tokens: int, repeats: int) -> dict[str, Any]:
    from farflung.cli.processes import processes
    from farflung.session import GenerateOptions, Swarm

    options = GenerateOptions(max_tokens=tokens, codecs=("int8",), ignore_eos=True)
    rates: dict[str, list[float]] = {"ring": [], **{f"plain_{threads}": [] for threads in THREADS}}
    async with processes() as group:
        directory = await group.start(
            "directory", ["farflung", "directory", "--listen", "127.0.0.1:0", "--json", "--exit-with-stdin"]
        )
        url = (await directory.event(READY_S))["url"]
        common = ["farflung", "node", "--directory", url, "--model", model, "--dtype", "bf16", "--threads", "1"]
        tail = ["--kv-tokens", "1024", "--ephemeral", "--json", "--exit-with-stdin"]
        for part in range(1, stages + 1):  # one after the other: the first start reads the model's files for all
            node = await group.start(f"node {part}", [*common, "--layers", f"{part}/{stages}", *tail])
            await node.event(READY_S)
        references = {}
        for threads in THREADS:
            references[threads] = await group.start(
                f"plain with {threads}", ["bench.loopback", "--reference", str(threads), "--model", model]
            )
            await references[threads].event(READY_S)
        async with Swarm.connect(url, model) as swarm:
            prompt = [token * 7919 % swarm.spec.vocab_size for token in range(PROMPT_TOKENS)]
            for turn in range(repeats + 1):
                generation = swarm.generate(prompt, options)
                await generation.text()
                measured = {"ring": generation.stats.decode_tokens_per_s}
                for threads, child in references.items():
                    child.send_line(str(tokens))
                    measured[f"plain_{threads}"] = (await child.event(READY_S))["tokens_per_s"]
                if turn:  # the first warms up
                    for name, rate in measured.items():
                        rates[name].append(rate)
    found = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "model": model,
        "stages": stages,
        "ring_tokens_per_s": round(found["ring"], 2),
        **{f"plain_{threads}_threads_tokens_per_s": round(found[f"plain_{threads}"], 2) for threads in THREADS},
        **{f"ratio_to_{threads}_threads": round(found["ring"] / found[f"plain_{threads}"], 3) for threads in THREADS},
        "stage_ms": [round(stage.decode_ms, 2) for stage in generation.stats.stages],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--reference", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, here and in every child
    if arguments.reference:
        serve_reference(arguments.model, arguments.reference)
        return
    result = asyncio.run(measure(arguments.model, arguments.stages, arguments.tokens, arguments.repeats))
    print(json.dumps(result) if arguments.json else "\n".join(f"{key:<28} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()

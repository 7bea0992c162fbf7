"""Many sessions at once on one route, beside one session alone, in one run.

    python -m bench.many [--model qwen2.5-coder-0.5b] [--stages 3] [--sessions 1,2,4,8,16] [--prefill 0] [--json]

Real node processes (bf16, one compute thread each, int8 rows) over loopback TLS; all sessions belong to one driver. Counts take
turns, so that a machine whose speed drifts drifts for all; figures are medians over the turns. ``--prefill N``: while the
sessions decode, others bring prompts of N tokens one after another, and the time between tokens is compared with that without.
Target: 8 sessions together make >= 3.5 times the tokens per second of one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farflung.session import Swarm

PROMPT_TOKENS = 64
READY_S = 600.0


class Run:
    """Token times of the sessions of one turn."""

    def __init__(self) -> None:
        self.times: list[list[float]] = []

    @property
    def tokens_per_s(self) -> float:
        """Of all sessions together, from when the last one has begun to decode until the first one ends."""
        start, stop = max(times[0] for times in self.times), min(times[-1] for times in self.times)
        return sum(start < time <= stop for times in self.times for time in times) / (stop - start)

    @property
    def gaps_ms(self) -> list[float]:
        return sorted((after - before) * 1e3 for times in self.times for before, after in pairwise(times))


async def decode(swarm: Swarm, sessions: int, tokens: int, seed: int) -> Run:
    """That many sessions with prompts of their own, from their first to their last token."""
    from farflung.session import GenerateOptions

    run, randomness = Run(), random.Random(seed)
    loop = asyncio.get_running_loop()

    async def one(prompt: Sequence[int]) -> None:
        times: list[float] = []
        run.times.append(times)
        async for token in swarm.generate(prompt, GenerateOptions(max_tokens=tokens, ignore_eos=True)):
            if token.id is not None:
                times.append(loop.time())

    async with asyncio.TaskGroup() as group:
        for _ in range(sessions):
            group.create_task(one([randomness.randrange(1000, 10000) for _ in range(PROMPT_TOKENS)]))
    return run


async def prompts(swarm: Swarm, tokens: int) -> None:
    """Prompts of that many tokens, one after another, until cancelled."""
    from farflung.session import GenerateOptions

    randomness = random.Random(tokens)
    while True:
        prompt = [randomness.randrange(1000, 10000) for _ in range(tokens)]
        await swarm.generate(prompt, GenerateOptions(max_tokens=1, ignore_eos=True)).text()


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from farflung.cli.processes import processes
    from farflung.session import Swarm

    counts = [int(count) for count in arguments.sessions.split(",")]
    lease = PROMPT_TOKENS + arguments.tokens + 64
    kv_tokens = max(counts) * lease + 2 * (arguments.prefill + 64)
    runs: dict[tuple[int, bool], list[Run]] = {}
    async with processes() as group:
        directory = await group.start(
            "directory", ["farflung", "directory", "--listen", "127.0.0.1:0", "--json", "--exit-with-stdin"]
        )
        url = (await directory.event(READY_S))["url"]
        common = ["farflung", "node", "--directory", url, "--model", arguments.model, "--dtype", "bf16", "--threads", "1"]
        tail = ["--kv-tokens", str(kv_tokens), "--ephemeral", "--json", "--exit-with-stdin"]
        for part in range(1, arguments.stages + 1):
            node = await group.start(f"node {part}", [*common, "--layers", f"{part}/{arguments.stages}", *tail])
            await node.event(READY_S)
        async with Swarm.connect(url, arguments.model) as swarm:
            await decode(swarm, max(counts), 4, seed=0)  # warms up
            for turn in range(arguments.turns):
                for count in counts:
                    runs.setdefault((count, False), []).append(await decode(swarm, count, arguments.tokens, turn))
                    if arguments.prefill:
                        others = asyncio.create_task(prompts(swarm, arguments.prefill))
                        runs.setdefault((count, True), []).append(await decode(swarm, count, arguments.tokens, turn))
                        others.cancel()
                        await asyncio.wait([others])
    alone = statistics.median(run.tokens_per_s for run in runs[min(counts), False]) / min(counts)
    rows = []
    for (count, with_prompts), found in runs.items():
        rate = statistics.median(run.tokens_per_s for run in found)
        gaps = sorted(gap for run in found for gap in run.gaps_ms)
        rows.append(
            {
                "sessions": count,
                "prompts_meanwhile": with_prompts,
                "tokens_per_s": round(rate, 2),
                "ratio_to_one": round(rate / alone, 2),
                "p50_ms": round(gaps[len(gaps) // 2], 1),
                "p95_ms": round(gaps[int(len(gaps) * 0.95)], 1),
            }
        )
    return {"model": arguments.model, "stages": arguments.stages, "runs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--sessions", default="1,2,4,8,16", help="how many at a time; the least is the measure")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--prefill", type=int, default=0, metavar="TOKENS", help="of the prompts that others bring meanwhile")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, here and in every child
    result = asyncio.run(measure(arguments))
    if arguments.json:
        print(json.dumps(result))
        return
    print("sessions  tokens/s  to one  p50 ms  p95 ms")
    for row in result["runs"]:
        print(
            f"{row['sessions']:>8}  {row['tokens_per_s']:>8}  {row['ratio_to_one']:>6}  {row['p50_ms']:>6}  {row['p95_ms']:>6}"
            + ("  beside prompts" if row["prompts_meanwhile"] else "")
        )


if __name__ == "__main__":
    main()

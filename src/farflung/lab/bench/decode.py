"""The suite ``decode``: time between tokens of one session, beside its floor.

The floor is the sum of one-way delays, serialisation at the rate a warm link reaches, and stage compute. Compute of replayed
stages is their curve; that of real ones is what they timed themselves during the run, so a busy machine falls on both sides.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median, quantiles

from farflung.lab.bench.case import Case
from farflung.lab.bench.member import Measured, Request
from farflung.lab.bench.rungs import Measures, Row
from farflung.lab.bench.swarm import LabSwarm, lab_swarm
from farflung.planning.cost import Curve, decode_cost

WARM_UP_TOKENS = 48
SETTLE_S = 4.0
"""After the warm-up: links have told each other their rates (as in ``lab.simulate``)."""


async def warm_up(case: Case, swarm: LabSwarm) -> None:
    """So that windows have opened and rates are known."""
    await swarm.generate(Request(case.prompt_tokens, WARM_UP_TOKENS, seed=0, codec=case.codec))
    await asyncio.sleep(SETTLE_S)


async def decode(case: Case, progress: Callable[[str], object] = lambda _: None) -> tuple[Row, Measures]:
    """One row, and what the rungs below need for theirs. Raises LabUnavailable, LabError, DeadlineExceeded."""
    async with lab_swarm(case, progress) as swarm:
        progress("warming up")
        await warm_up(case, swarm)
        runs = []
        for repeat in range(case.repeats):
            progress(f"decoding, {repeat + 1} of {case.repeats}")
            request = Request(case.prompt_tokens, case.tokens + 1, seed=case.seed + repeat, codec=case.codec)
            runs.append(await swarm.generate(request))
        known = Measures(hidden_size=swarm.hidden_size, curves=decode_curves(case, runs), link_bytes_per_s=math.inf)
        return decode_row(case, swarm.hidden_size, runs), known


def decode_curves(case: Case, runs: Sequence[Measured]) -> tuple[Curve, ...]:
    """Of each stage: the replayed one, or the time of its decode steps."""
    if case.backend == "replay":
        return (case.replay_curve(),) * case.stages
    return tuple(((1, median(column)),) for column in zip(*(run.stage_ms for run in runs), strict=True))


def decode_row(case: Case, hidden_size: int, runs: Sequence[Measured]) -> Row:
    """The row of some runs: medians over them, with the least and the most of their medians."""
    floors_ms = [floor_ms(case, hidden_size, run) for run in runs]
    medians_ms = [1e3 * median(run.inter_token_s) for run in runs]
    rates = [len(run.inter_token_s) / sum(run.inter_token_s) for run in runs]
    times_ms = [1e3 * time_s for run in runs for time_s in run.inter_token_s]
    ratios = [found / floor for found, floor in zip(medians_ms, floors_ms, strict=True)]
    between = median(run.between_stages for run in runs)
    row: Row = {
        **case.about(),
        "tokens_per_s": round(median(rates), 3),
        "inter_token_ms": {
            "p50": round(median(medians_ms), 3),
            "p95": round(quantiles(times_ms, n=20, method="inclusive")[-1], 3),
            "min": round(min(medians_ms), 3),
            "max": round(max(medians_ms), 3),
        },
        "floor_ms": round(median(floors_ms), 3),
        "floor_ratio": round(median(ratios), 4),
        "stage_ms": [round(median(column), 3) for column in zip(*(run.stage_ms for run in runs), strict=True)],
        "bytes_per_value": round(between / hidden_size, 4),
        "bytes_per_token": {
            "between_stages": round(between, 1),
            "driver_up": round(median(run.driver_up for run in runs), 1),
            "driver_down": round(median(run.driver_down for run in runs), 1),
        },
        "ttft_s": round(median(run.ttft_s for run in runs), 4),
        "reconnects": sum(run.reconnects for run in runs),
        "repeats": len(runs),
    }
    if runs[0].same_tokens is not None:
        row["same_tokens"] = all(run.same_tokens for run in runs)
    return row


def floor_ms(case: Case, hidden_size: int, run: Measured) -> float:
    """The least that one token can take on that ring."""
    return 1e3 * decode_cost(at_line_rate(case).ring(hidden_size, decode_curves(case, [run]))).floor_s


def at_line_rate(case: Case) -> Case:
    """The rows of one token fit into the first packets of any link: what congestion control makes of it does not slow them."""
    return replace(case, reached_bytes_per_s=math.inf)

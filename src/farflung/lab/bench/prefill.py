"""The suite ``prefill``: time to the first token of a long prompt, beside the floor of a pipelined prefill on warm links.

The driver chooses the chunk by its measurements (``session.chunks``). The first request of all, over cold links, is reported
beside: ``cold_ttft_s``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median, median_low

from farflung.core.errors import LabError
from farflung.lab.bench.case import Case
from farflung.lab.bench.decode import warm_up
from farflung.lab.bench.member import Measured, Request
from farflung.lab.bench.rungs import Measures, Row, measured_link, reached
from farflung.lab.bench.swarm import lab_swarm
from farflung.planning.cost import Curve, prefill_cost


async def prefill(case: Case, progress: Callable[[str], object] = lambda _: None) -> tuple[Row, Measures]:
    """One row, and what the rungs below need for theirs. Raises LabUnavailable, LabError, DeadlineExceeded."""
    async with lab_swarm(case, progress) as swarm:
        progress("the first request, over cold links")
        cold = await swarm.generate(Request(case.prompt_tokens, 1, seed=0, codec=case.codec))
        progress("warming up")
        await warm_up(case, swarm)
        await swarm.generate(Request(case.prompt_tokens, 1, seed=case.seed + case.repeats, codec=case.codec))
        runs = []
        for repeat in range(case.repeats):
            progress(f"a prompt of {case.prompt_tokens} tokens, {repeat + 1} of {case.repeats}")
            request = Request(case.prompt_tokens, 1, seed=case.seed + repeat, codec=case.codec)
            runs.append(await swarm.generate(request))
        known = Measures(
            hidden_size=swarm.hidden_size,
            curves=_curves(case, cold),
            chunk_tokens=median_low(run.chunk_tokens for run in runs),
            link_bytes_per_s=reached(case, measured_link([run.link_bytes_per_s for run in runs])),
        )
        return prefill_row(case, known, cold, runs), known


def prefill_row(case: Case, known: Measures, cold: Measured, runs: Sequence[Measured]) -> Row:
    """The row of some runs: medians over them, with the least and the most."""
    chunk = known.chunk_tokens
    cost = prefill_cost(known.ring(case), case.prompt_tokens, chunk)
    times = [run.ttft_s for run in runs]
    row: Row = {
        **case.about(),
        "prompt_tokens": case.prompt_tokens,
        "chunk_tokens": chunk,
        "ttft_s": round(median(times), 4),
        "ttft_s_min": round(min(times), 4),
        "ttft_s_max": round(max(times), 4),
        "floor_s": round(cost.floor_s, 4),
        "floor_ratio": round(median(times) / cost.floor_s, 4),
        "planned_s": round(cost.expected_s, 4),
        "link_mbps": None if known.link_bytes_per_s is None else round(known.link_bytes_per_s * 8e-6, 1),
        "cold_ttft_s": round(cold.ttft_s, 4),
        "driver_up_bytes": round(median(run.bytes_sent for run in runs)),
        "repeats": len(runs),
    }
    if cold.same_tokens is not None:
        row["same_tokens"] = all(run.same_tokens for run in (cold, *runs))
    return row


def _curves(case: Case, run: Measured) -> tuple[Curve, ...]:
    if case.backend == "replay":
        return (case.replay_curve(),) * case.stages
    if not all(run.curves):
        raise LabError("a stage announces no T-curve, and without it there is no floor")
    return tuple(tuple(curve) for curve in run.curves)

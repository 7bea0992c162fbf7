"""The suite ``many``: sessions that run together, beside one alone in the same swarm.

Its case ``head-of-line``: a session decodes, and the long prompt of another comes beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median, median_low, quantiles

from farflung.lab.bench.case import Case
from farflung.lab.bench.decode import floor_ms, warm_up
from farflung.lab.bench.member import Answer, Measured, Request
from farflung.lab.bench.rungs import Row
from farflung.lab.bench.swarm import lab_swarm


async def many(case: Case, progress: Callable[[str], object] = lambda _: None) -> tuple[Row, None]:
    """One row; the rungs below have none for it. Raises LabUnavailable, LabError, DeadlineExceeded."""
    async with lab_swarm(case, progress) as swarm:
        progress("warming up")
        await warm_up(case, swarm)
        alone, together = [], []
        for repeat in range(case.repeats):
            progress(f"one session, then {case.sessions} together, {repeat + 1} of {case.repeats}")
            one = Request(case.prompt_tokens, case.tokens + 1, seed=case.seed + repeat, codec=case.codec)
            alone.append(await swarm.generate(one))
            all_of_them = Request(one.prompt_tokens, one.max_tokens, one.seed, one.codec, sessions=case.sessions)
            together.append(await swarm.generate_together(all_of_them))
        return many_row(case, swarm.hidden_size, alone, together), None


OTHER_PROMPT_TOKENS = 2000
MOST_TOKENS = 2000
"""Of the running session, should the prompt take so long."""


async def head_of_line(case: Case, progress: Callable[[str], object] = lambda _: None) -> tuple[Row, None]:
    """As ``many``."""
    async with lab_swarm(case, progress) as swarm:
        progress("warming up")
        await warm_up(case, swarm)
        alone, beside = [], []
        for repeat in range(case.repeats):
            seed = case.seed + repeat
            progress(f"one session, then a prompt of {OTHER_PROMPT_TOKENS} beside it, {repeat + 1} of {case.repeats}")
            alone.append(await swarm.generate(Request(case.prompt_tokens, case.tokens + 1, seed, case.codec)))
            both = Request(case.prompt_tokens, MOST_TOKENS, seed, case.codec, other_prompt_tokens=OTHER_PROMPT_TOKENS)
            beside.append(await swarm.generate_together(both))
        return head_of_line_row(case, swarm.hidden_size, alone, beside), None


def head_of_line_row(case: Case, hidden_size: int, alone: Sequence[Measured], beside: Sequence[Answer]) -> Row:
    """Over all repeats together: a prompt may pass within a dozen tokens."""
    before = [1e3 * time_s for run in alone for time_s in run.inter_token_s]
    during = [1e3 * time_s for answer in beside for time_s in answer.runs[0].inter_token_s]
    others = [answer.runs[1] for answer in beside]
    row: Row = {
        **case.about(),
        "case": "head-of-line",
        "other_prompt_tokens": OTHER_PROMPT_TOKENS,
        "alone_ms": {"p50": round(median(before), 3), "p95": round(_p95(before), 3)},
        "inter_token_ms": {"p50": round(median(during), 3), "p95": round(_p95(during), 3)},
        "p95_ratio": round(_p95(during) / _p95(before), 4),
        "tokens": len(during),
        "floor_ms": round(median(floor_ms(case, hidden_size, run) for run in alone), 3),
        "other_ttft_s": round(median(run.ttft_s for run in others), 4),
        "chunk_tokens": median_low(run.chunk_tokens for run in others),
        "repeats": len(beside),
    }
    if others[0].same_tokens is not None:
        row["same_tokens"] = all(run.same_tokens for run in (*alone, *others, *(answer.runs[0] for answer in beside)))
    return row


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def many_row(case: Case, hidden_size: int, alone: Sequence[Measured], together: Sequence[Answer]) -> Row:
    """Medians over the repeats. The total rate is all tokens over the time from the first beginning to the last end, prompts
    included; the floor is that of one session alone."""
    runs = [run for answer in together for run in answer.runs]
    times_ms = [1e3 * time_s for run in runs for time_s in run.inter_token_s]
    total = median(sum(len(run.token_ids) for run in answer.runs) / answer.wall_s for answer in together)
    single = median(len(run.inter_token_s) / sum(run.inter_token_s) for run in alone)
    floor = median(floor_ms(case, hidden_size, run) for run in alone)
    row: Row = {
        **case.about(),
        "sessions": case.sessions,
        "total_tokens_per_s": round(total, 3),
        "single_tokens_per_s": round(single, 3),
        "inter_token_ms": {
            "p50": round(median(times_ms), 3),
            "p95": round(_p95(times_ms), 3),
        },
        "floor_ms": round(floor, 3),
        "floor_ratio": round(median(times_ms) / floor, 4),
        "ttft_s": round(median(run.ttft_s for run in runs), 4),
        "repeats": len(together),
    }
    if runs[0].same_tokens is not None:
        row["same_tokens"] = all(run.same_tokens for run in runs)
    return row

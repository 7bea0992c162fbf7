"""The rungs below the emulated network, for the same case: what the planner expects, and what the simulator makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from farflung.core.errors import UsageError
from farflung.lab.access import Access
from farflung.lab.bench.case import REPLAY_HIDDEN, Case
from farflung.lab.rows import rows_of
from farflung.lab.scenario import Drivers, Load, Model, Net, Nodes, Scenario
from farflung.lab.simulate import simulate
from farflung.planning.cost import Curve, Ring, choose_chunk, decode_cost, prefill_cost

Row = dict[str, object]

RUNGS = ("plan", "simulate", "emulate")

SIMULATED_SESSIONS = 16
"""With jitter a median needs many."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What a rung below has to know of the stages and their links.

    Attributes:
        hidden_size: of the model.
        curves: T-curve of each stage.
        chunk_tokens: prompt tokens per window; 0: the planner's choice.
        link_bytes_per_s: what links between stages reach, as for ``Case.reached_bytes_per_s``.
    """

    hidden_size: int
    curves: tuple[Curve, ...]
    chunk_tokens: int = 0
    link_bytes_per_s: float | None = None

    def ring(self, case: Case) -> Ring:
        """The route as the planner sees it."""
        return replace(case, reached_bytes_per_s=self.link_bytes_per_s).ring(self.hidden_size, self.curves)


def replayed(suite: str, case: Case) -> Measures:
    """Of a replay everything is known beforehand. Raises UsageError for real stages."""
    if case.backend != "replay":
        raise UsageError(
            "what real stages take is not known beforehand",
            hint="add emulate to --rung, which measures it, or --backend replay",
        )
    rate = math.inf if suite == "decode" else None
    return Measures(hidden_size=REPLAY_HIDDEN, curves=(case.replay_curve(),) * case.stages, link_bytes_per_s=rate)


def plan_row(suite: str, case: Case, known: Measures) -> Row:
    """What the planner expects of ``decode`` or ``prefill``."""
    ring = known.ring(case)
    if suite == "decode":
        cost = decode_cost(ring)
        return {
            **case.about("plan"),
            "tokens_per_s": round(1 / cost.expected_s, 3),
            "inter_token_ms": {"p50": round(1e3 * cost.expected_s, 3), "p95": round(1e3 * cost.expected_s, 3)},
            "floor_ms": round(1e3 * cost.floor_s, 3),
            "floor_ratio": round(cost.expected_s / cost.floor_s, 4),
        }
    chunk = known.chunk_tokens or choose_chunk(ring, case.prompt_tokens)
    cost = prefill_cost(ring, case.prompt_tokens, chunk)
    return {
        **case.about("plan"),
        "prompt_tokens": case.prompt_tokens,
        "chunk_tokens": chunk,
        "ttft_s": round(cost.expected_s, 4),
        "floor_s": round(cost.floor_s, 4),
        "floor_ratio": round(cost.expected_s / cost.floor_s, 4),
    }


_KEPT = {
    "decode": ("tokens_per_s", "inter_token_ms", "floor_ms", "floor_ratio", "bytes_per_value", "bytes_per_token"),
    "prefill": ("prompt_tokens", "chunk_tokens", "ttft_s", "floor_s", "floor_ratio", "driver_up_bytes"),
}


def simulate_row(suite: str, case: Case, known: Measures) -> Row:
    """The same on a virtual clock: our own nodes and driver, memory links. Takes seconds."""
    made = scenario_of(suite, case, known)
    found = next(row for row in rows_of(made, simulate(made)) if row["rung"] == "simulate")
    kept = {key: found[key] for key in (*_KEPT[suite], "same_tokens", "reconnects", "failed") if key in found}
    return {**case.about("simulate"), **kept}


def scenario_of(suite: str, case: Case, known: Measures) -> Scenario:
    """The case as data for the simulator. A stage is one layer there: its time is its curve's."""
    access = replace(case, reached_bytes_per_s=known.link_bytes_per_s).access
    net = Net(**asdict(access))
    stages = tuple(
        Nodes(name=f"stage{number}-", layers=f"{number}:{number + 1}", curve_ms=tuple(curve), net=net)
        for number, curve in enumerate(known.curves)
    )
    load = Load(
        name=suite,
        sessions=SIMULATED_SESSIONS if _wanders(access) else case.repeats,
        one_by_one=True,
        prompt_tokens=case.prompt_tokens,
        max_tokens=case.tokens + 1 if suite == "decode" else 1,
        chunk_tokens=known.chunk_tokens,
        codecs=(case.codec,),
    )
    model = Model(name=case.model, layers=len(stages), hidden_size=known.hidden_size)
    return Scenario(model=model, nodes=stages, drivers=(Drivers(net=net),), load=(load,), name=suite, seed=case.seed)


def with_ratios(suite: str, rows: Sequence[Row]) -> list[Row]:
    """Rows of one case, the lowest rung first; each but the first gets ``to_rung_below``, a ratio of times."""
    told: list[Row] = []
    for place, row in enumerate(rows):
        below = None if place == 0 else _time(suite, rows[place - 1])
        told.append(row if not below else {**row, "to_rung_below": round(_time(suite, row) / below, 4)})
    return told


def measured_link(rates: Sequence[Sequence[float]]) -> float | None:
    """What warm links between stages reach, by what each of several runs was told of each: the least of the best; None where
    one was not measured."""
    best = [max(column) for column in zip(*rates, strict=True)]
    return min(best, default=None) if all(best) else None


def reached(case: Case, measured: float | None) -> float | None:
    """The rate that a warm link of that network keeps up: what its profile is known for, unless bursts were slower."""
    known = case.access.up_bytes_per_s
    return min((rate for rate in (known, measured) if rate is not None), default=None)


def _time(suite: str, row: Row) -> float:
    value = row["inter_token_ms"] if suite == "decode" else row["ttft_s"]
    return float(value["p50"]) if isinstance(value, Mapping) else float(str(value))


def _wanders(access: Access) -> bool:
    return access.jitter_ms > 0 or access.loss_pct > 0

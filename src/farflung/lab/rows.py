"""From the sessions of a simulation to the rows that people and scripts read: the keys are those of ``farflung lab bench``.

A row covers one load: what its sessions had in the middle, and how that compares with the floor of their rings
(``planning.cost``). ``rung`` is ``simulate``; for each there is a row of rung ``plan``, of one such session alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, median_low, quantiles

from farflung.core.ids import NodeId
from farflung.lab.access import Access
from farflung.lab.plan import plan_ring
from farflung.lab.scenario import Load, Scenario
from farflung.lab.simulate import SessionRun, Simulated
from farflung.planning.cost import Cost, Curve, decode_cost, prefill_cost

Row = dict[str, object]

_Key = tuple[str, tuple[NodeId, ...], int, int]
"""Driver, route, tokens of the prompt and of each window."""


@dataclass(frozen=True)
class _Member:
    access: Access
    curve: Curve


def rows_of(scenario: Scenario, done: Simulated) -> list[Row]:
    """A row of rung ``plan`` and one of rung ``simulate`` for each load of which a session came to its end, else the latter
    alone. ``floor_ms`` and ``floor_ratio`` are those of decode, ``floor_s`` and ``ttft_floor_ratio`` those of the first token;
    where sessions generate no more than that, ``floor_ratio`` is that, too."""
    members = _members(scenario, done.node_names)
    rows: list[Row] = []
    for load in scenario.load:
        costs: dict[_Key, tuple[Cost, Cost]] = {}
        runs = done.runs[load.name]
        ended = [run for run in runs if not run.error and run.stats.ttft_s is not None]
        found = []
        for run in ended:
            hops = () if run.stats.route is None else run.stats.route.hops
            key = run.driver, tuple(hop.node_id for hop in hops), run.stats.prompt_tokens, run.stats.chunk_tokens
            if key not in costs:
                costs[key] = _costs(scenario, load, members, key)
            found.append(costs[key])
        common = _common(scenario, load, members)
        if ended:
            common["chunk_tokens"] = median_low(run.stats.chunk_tokens for run in ended)
        if ended:
            rows.append({**common, "rung": "plan", **_planned(load, found)})
        rows.append({**common, "rung": "simulate", **_simulated(scenario, runs, ended, found)})
    return rows


def _members(scenario: Scenario, names: Mapping[NodeId, str]) -> dict[str, _Member]:
    """By name, and by id."""
    of_group = {group.name: _Member(group.net.access, group.curve) for group in scenario.nodes}
    of_group |= {group.name: _Member(group.net.access, ()) for group in scenario.drivers}
    by_name = {name: of_group[name.rstrip("0123456789")] for name in names.values()}
    return by_name | {node_id: by_name[name] for node_id, name in names.items()}


def _costs(scenario: Scenario, load: Load, members: Mapping[str, _Member], key: _Key) -> tuple[Cost, Cost]:
    driver, hops, prompt_tokens, chunk_tokens = key
    ring = plan_ring(
        members[driver].access,
        [(members[hop].access, members[hop].curve) for hop in hops],
        codec_name=load.codecs[0],
        hidden_size=scenario.model.hidden_size,
    )
    return decode_cost(ring), prefill_cost(ring, prompt_tokens, chunk_tokens)


def _common(scenario: Scenario, load: Load, members: Mapping[str, _Member]) -> Row:
    group = next(group for group in scenario.drivers if group.name == load.drivers)
    access = group.net.access
    net: Row = {"net": group.net.profile} if group.net.profile else {"rtt_ms": access.rtt_ms, "up_mbps": access.up_mbps}
    stages = max(len(set(nodes.ranges(scenario.model.layers))) for nodes in scenario.nodes)
    return {
        "scenario": scenario.name,
        "load": load.name,
        **net,
        "backend": "replay",
        "model": scenario.model.name,
        "stages": stages,
        "sessions": load.sessions,
        "prompt_tokens": load.prompt_tokens,
        "max_tokens": load.max_tokens,
        "chunk_tokens": load.chunk_tokens,
    }


def _planned(load: Load, found: Sequence[tuple[Cost, Cost]]) -> Row:
    decode = median(cost.expected_s for cost, _ in found)
    decode_floor = median(cost.floor_s for cost, _ in found)
    prefill = median(cost.expected_s for _, cost in found)
    prefill_floor = median(cost.floor_s for _, cost in found)
    if load.max_tokens == 1:
        return {
            "ttft_s": round(prefill, 6),
            "floor_s": round(prefill_floor, 6),
            "floor_ratio": _ratio(prefill, prefill_floor),
            "ttft_floor_ratio": _ratio(prefill, prefill_floor),
        }
    return {
        "tokens_per_s": round(1 / decode, 3) if decode else 0.0,
        "inter_token_ms": {"mean": round(decode * 1e3, 3), "p50": round(decode * 1e3, 3)},
        "floor_ms": round(decode_floor * 1e3, 3),
        "floor_ratio": _ratio(decode, decode_floor),
        "ttft_s": round(prefill, 6),
        "floor_s": round(prefill_floor, 6),
        "ttft_floor_ratio": _ratio(prefill, prefill_floor),
    }


def _simulated(
    scenario: Scenario, runs: Sequence[SessionRun], ended: Sequence[SessionRun], found: Sequence[tuple[Cost, Cost]]
) -> Row:
    row: Row = {
        "failed": len(runs) - len(ended),
        "errors": sorted({run.error.partition(":")[0] for run in runs if run.error}),
        "same_tokens": all(run.same_tokens for run in runs),
        "reconnects": sum(run.stats.reconnects for run in runs),
    }
    if not ended:
        return row
    times_ms = [1e3 * time_s for run in ended for time_s in run.stats.inter_token_s]
    ttft = [run.stats.ttft_s or 0.0 for run in ended]
    tokens = sum(len(run.stats.token_ids) for run in ended)
    lasted_s = max(run.ended_s for run in ended) - min(run.began_s for run in ended)
    row |= {"total_tokens_per_s": round(tokens / lasted_s, 3) if lasted_s else 0.0}
    if times_ms:
        floor_ms = median(cost.floor_s for cost, _ in found) * 1e3
        bytes_per_token = [run.stats.bytes_per_token() for run in ended]
        between = median(of["between_stages_max"] for of in bytes_per_token)
        row |= {
            "tokens_per_s": round(median(run.stats.decode_tokens_per_s for run in ended), 3),
            "inter_token_ms": {"mean": round(fmean(times_ms), 3), "p50": round(median(times_ms), 3), "p95": _p95(times_ms)},
            "floor_ms": round(floor_ms, 3),
            "floor_ratio": _ratio(median(times_ms), floor_ms),
            "bytes_per_value": round(between / scenario.model.hidden_size, 4),
            "bytes_per_token": {
                "between_stages": round(between, 1),
                "driver_up": round(median(of["driver_up"] for of in bytes_per_token), 1),
                "driver_down": round(median(of["driver_down"] for of in bytes_per_token), 1),
            },
        }
    floor_s = median(cost.floor_s for _, cost in found)
    if not times_ms:  # a load of prompts alone
        row |= {"floor_ratio": _ratio(median(ttft), floor_s)}
    return row | {
        "ttft_s": round(median(ttft), 6),
        "ttft_s_p95": _p95(ttft),
        "floor_s": round(floor_s, 6),
        "ttft_floor_ratio": _ratio(median(ttft), floor_s),
        "driver_up_bytes": round(median(run.stats.bytes_sent for run in ended)),
    }


def _ratio(value: float, floor: float) -> float:
    return round(value / floor, 4) if floor else 0.0


def _p95(values: Sequence[float]) -> float:
    return round(quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0], 6)

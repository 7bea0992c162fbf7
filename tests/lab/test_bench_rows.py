"""Rows of ``farflung lab bench`` and how they are shown."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from farflung.cli.app import run
from farflung.core.errors import UsageError
from farflung.lab.bench.case import Case, connections
from farflung.lab.bench.decode import decode_row
from farflung.lab.bench.many import head_of_line_row, many_row
from farflung.lab.bench.member import Answer, Measured
from farflung.lab.bench.prefill import prefill_row
from farflung.lab.bench.report import (
    decode_plot,
    decode_table,
    head_of_line_plot,
    head_of_line_table,
    many_plot,
    many_table,
    prefill_plot,
    prefill_table,
)
from farflung.lab.bench.rungs import measured_link, plan_row, reached, replayed, simulate_row, with_ratios
from farflung.lab.net.profiles import named_connection


def measured(ms: float, stage_ms: tuple[float, ...] = (13.0, 13.0), same: bool | None = None) -> Measured:
    return Measured(
        ttft_s=0.5,
        inter_token_s=[ms / 1e3] * 20,
        between_stages=8448.0,
        driver_up=60.0,
        driver_down=50.0,
        bytes_sent=1200,
        stage_ms=list(stage_ms),
        token_ids=[1] * 21,
        same_tokens=same,
        curves=[[(1, 13.0), (64, 30.0)], [(1, 13.0), (64, 30.0)]],
        reconnects=0,
    )


def case(net: str = "cable", **settings: object) -> Case:
    return Case(net=net, connection=named_connection(net), stages=2, **settings)  # type: ignore[arg-type]


def test_a_row_has_the_keys_that_scripts_rely_on_and_the_ratio_to_its_floor() -> None:
    row = decode_row(case(), 8192, [measured(70), measured(72), measured(80)])
    assert {"net", "backend", "model", "stages", "rung", "tokens_per_s", "inter_token_ms", "floor_ms", "floor_ratio"} <= set(
        row
    )
    assert {"bytes_per_value", "bytes_per_token"} <= set(row)
    # three legs of 10 ms, two stages of 13 ms, one row of 8.4 KB at 20 Mbps less TCP's headers, and the ids
    assert row["floor_ms"] == pytest.approx(30 + 26 + 8192 * 1.0195 / 2413, rel=0.01)
    assert row["floor_ratio"] == pytest.approx(72 / float(str(row["floor_ms"])), rel=1e-3)
    assert row["inter_token_ms"] == {"p50": 72.0, "p95": pytest.approx(80), "min": 70.0, "max": 80.0}
    assert row["bytes_per_value"] == 1.0312


def test_a_replay_s_floor_is_its_curve_whatever_the_stages_say() -> None:
    busy, quiet = (
        decode_row(case(backend="replay"), 8192, [measured(90, stage_ms, same=True)]) for stage_ms in ((50, 50), (25, 25))
    )
    assert busy["floor_ms"] == quiet["floor_ms"]
    assert busy["same_tokens"] is True
    assert "same_tokens" not in decode_row(case(), 8192, [measured(90)])


def test_every_member_of_the_swarm_has_its_place_and_the_directory_is_near() -> None:
    nodes = {node.name: node for node in case("5g+lossy").topology().nodes}
    assert list(nodes) == ["directory", "driver", "stage1", "stage2"]
    assert nodes["directory"].label == "lan"
    assert {nodes[name].label for name in ("driver", "stage1", "stage2")} == {"5g+lossy"}


@pytest.mark.parametrize("stages", [1, 3, 4, 7])
def test_replayed_stages_cover_every_layer_once(stages: int) -> None:
    wanted = Case(net="lan", connection=named_connection("lan"), backend="replay", stages=stages)
    ranges = [wanted.replay_layers(stage) for stage in range(stages)]
    assert [layer for start, stop in ranges for layer in range(start, stop)] == list(range(80))


def test_a_network_is_named_or_described_and_never_both() -> None:
    assert [name for name, _ in connections("fiber,5g+jittery", {})] == ["fiber", "5g+jittery"]
    ((name, line),) = connections("", {"rtt_ms": 80.0, "up_mbps": 10.0, "jitter_pct": 0.0})
    assert (name, line.rtt_ms, line.up_mbps, line.down_mbps) == ("rtt_ms=80 up_mbps=10", 80, 10, 0)
    with pytest.raises(UsageError, match="exclude each other"):
        connections("fiber", {"rtt_ms": 80.0})
    with pytest.raises(UsageError, match="no network profile"):
        connections("fibre", {})


@pytest.mark.parametrize("wrong", [{"backend": "dream"}, {"tokens": 0}, {"repeats": 0}])
def test_a_case_that_cannot_be_run_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        case(**wrong)


def test_the_table_and_the_picture_show_every_row() -> None:
    rows = [decode_row(case(net), 8192, [measured(70)]) for net in ("fiber", "cable+lossy")]
    table = decode_table(rows)
    assert table.count("\n") == 4
    assert "| cable+lossy | 14.29 |" in table
    drawing = ET.fromstring(decode_plot(rows, "a <title> & more"))
    assert len(drawing.findall("{http://www.w3.org/2000/svg}rect")) == 3
    words = [element.text for element in drawing.findall("{http://www.w3.org/2000/svg}text")]
    assert {"fiber", "cable", "+lossy", "a <title> & more", "14.3"} <= set(words)


def test_a_prefill_row_stands_beside_the_floor_and_the_cold_request() -> None:
    wanted = case(backend="replay", prompt_tokens=512)
    known = replace(replayed("prefill", wanted), chunk_tokens=64)
    row = prefill_row(wanted, known, measured(0, same=True), [measured(0, same=True)] * 3)
    assert {"net", "prompt_tokens", "ttft_s", "floor_s", "floor_ratio", "driver_up_bytes", "cold_ttft_s"} <= set(row)
    floor_s = float(str(row["floor_s"]))
    assert floor_s >= 512 * 8192 * 1.0195 / 2.5e6  # an uplink of 20 Mbps has to carry the rows once
    assert row["floor_ratio"] == pytest.approx(0.5 / floor_s, rel=1e-3)
    assert float(str(row["planned_s"])) >= floor_s
    assert f"| cable | 512 | 64 | 0.500 (0.50-0.50) | {floor_s:.3f} |" in prefill_table([row])
    assert "seconds to the first token" in prefill_plot([row], "prefill")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dream"], "no suite 'dream'"),
        (["decode", "--rung", "plan,dream"], "no rung 'dream'"),
        (["many", "--rung", "plan"], "many is emulated only"),
        (["decode", "--case", "head-of-line"], "decode has no case 'head-of-line'"),
        (["decode", "--rung", "plan", "--net", "fiber"], "not known beforehand"),
        (["decode", "--net", "fibre"], "no network profile 'fibre'"),
        (["decode", "--net", "fiber", "--rtt-ms", "3"], "exclude each other"),
        (["decode", "--backend", "dream"], "'dream' is unknown"),
    ],
)
def test_a_benchmark_that_cannot_be_run_is_refused_before_anything_starts(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FARFLUNG_DEFAULTS", "off")
    assert run(["lab", "bench", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("suite", ["decode", "prefill"])
@pytest.mark.parametrize("net", ["fiber", "cable+jittery"])
def test_the_rungs_of_one_case_stand_side_by_side(suite: str, net: str) -> None:
    wanted = case(net, backend="replay", prompt_tokens=200, tokens=8)
    known = replayed(suite, wanted)
    plan, simulated = with_ratios(suite, [plan_row(suite, wanted, known), simulate_row(suite, wanted, known)])
    assert (plan["rung"], simulated["rung"], simulated["same_tokens"], simulated["failed"]) == ("plan", "simulate", True, 0)
    assert "to_rung_below" not in plan
    assert simulated["to_rung_below"] == pytest.approx(1, abs=0.05 if net == "fiber" else 0.25)
    table = {"decode": decode_table, "prefill": prefill_table}[suite]([plan, simulated])
    assert f"| {net} | simulate | {simulated['to_rung_below']:.3f} |" in table


def test_a_slow_link_is_planned_for_as_it_was_measured() -> None:
    wanted = case("intercontinental", backend="replay", prompt_tokens=512)
    known = replayed("prefill", wanted)
    slow = replace(known, link_bytes_per_s=2e6)
    assert replace(wanted, reached_bytes_per_s=2e6).access.up_bytes_per_s == pytest.approx(2e6)
    assert plan_row("prefill", wanted, slow)["floor_s"] > plan_row("prefill", wanted, known)["floor_s"]  # type: ignore[operator]
    assert reached(wanted, 50e6) == reached(wanted, None) == wanted.access.up_bytes_per_s
    assert reached(wanted, 1e6) == 1e6
    assert measured_link([[1.0, 9.0], [2.0, 0.0]]) == 2.0
    assert measured_link([[1.0, 0.0]]) is measured_link([]) is None


def test_many_sessions_stand_beside_one_alone() -> None:
    together = Answer([measured(90, same=True), measured(100, same=True)], wall_s=2.1)
    row = many_row(case(backend="replay", sessions=2), 8192, [measured(70)], [together])
    assert (row["sessions"], row["total_tokens_per_s"]) == (2, 20.0)
    assert row["single_tokens_per_s"] == pytest.approx(14.286, abs=1e-3)
    assert row["same_tokens"] is True
    assert "| cable | 2 | 20.0 | 14.3 |" in many_table([row])
    assert "tokens/s of all sessions" in many_plot([row], "many")


def test_a_session_beside_another_s_long_prompt_stands_beside_itself_alone() -> None:
    beside = Answer([measured(90, same=True), measured(0, same=True)], wall_s=2.1)
    row = head_of_line_row(case(backend="replay"), 8192, [measured(75)] * 2, [beside] * 2)
    assert row["p95_ratio"] == pytest.approx(1.2)
    assert (row["tokens"], row["other_ttft_s"]) == (40, 0.5)
    assert "| cable | 75.0 | 75.0 | 90.0 | 90.0 | 1.200 | 40 | 0.50 |" in head_of_line_table([row])
    assert "95th percentile" in head_of_line_plot([row], "head of line")

"""Scenarios on the virtual clock: the real code, no model, the same rows for the same seed, and what the planner said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from farflung.core.errors import ConfigError
from farflung.engine.replay_tokens import read_traces
from farflung.lab.access import profile
from farflung.lab.net.profiles import PROFILES
from farflung.lab.plan import plan_ring
from farflung.lab.rows import rows_of
from farflung.lab.scenario import Drivers, Fault, Load, Model, Net, Nodes, Scenario, read_scenario
from farflung.lab.simulate import Simulated, simulate
from farflung.planning.cost import choose_chunk

MODEL = Model(name="70b-4bit", layers=80, hidden_size=8192)
STEP_MS = (13.0, 0.2)
"""(48 + 0.8 n) / 4 + 1 ms for n tokens: a quarter of a 70B model in 4 bits."""


def scenario(net: str, *load: Load, replicas: int = 1, **more: object) -> Scenario:
    return Scenario(
        model=MODEL,
        nodes=(Nodes(stages=4, replicas=replicas, step_ms=STEP_MS, net=Net(profile=net)),),
        drivers=(Drivers(net=Net(profile=net)),),
        load=load,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("net", PROFILES)
def test_plan_and_simulation_agree_within_five_percent_on_decode_and_on_prefill(net: str) -> None:
    """Where delays wander by 14 ms each way a mean needs many windows; elsewhere all are alike."""
    access = profile(net)
    curve = ((1, 13.2), (4096, 832.2))
    ring = plan_ring(access, [(access, curve)] * 4, codec_name="int8", hidden_size=8192)
    decode, prefill = (120, 16) if access.jitter_ms else (20, 2)
    chosen = choose_chunk(ring, 512)
    made = scenario(
        net,
        Load(name="decode", max_tokens=decode),
        *(
            Load(
                name=f"prefill {chunk}",
                start_s=60 + 100 * place,
                prompt_tokens=512,
                max_tokens=1,
                chunk_tokens=chunk,
                sessions=prefill,
                one_by_one=True,
            )
            for place, chunk in enumerate((chosen, 128))
        ),
    )
    rows = rows_of(made, simulate(made))
    assert [row["rung"] for row in rows] == ["plan", "simulate"] * 3
    for plan, simulated in zip(rows[::2], rows[1::2], strict=True):
        assert simulated["failed"] == 0
        assert simulated["same_tokens"] is True
        if plan["load"] == "decode":
            assert simulated["inter_token_ms"]["mean"] == pytest.approx(plan["inter_token_ms"]["mean"], rel=0.05)  # type: ignore[index]
        else:
            assert simulated["ttft_s"] == pytest.approx(plan["ttft_s"], rel=0.05)
    decoded = rows[1]
    assert decoded["bytes_per_value"] <= 1.06  # type: ignore[operator]
    assert rows[3]["driver_up_bytes"] < 4000  # type: ignore[operator]
    assert rows[3]["floor_ratio"] <= 1.2  # type: ignore[operator]


@pytest.mark.parametrize("net", PROFILES)
def test_the_driver_s_own_chunk_is_near_the_floor_once_links_are_warm(net: str) -> None:
    load = Load(name="prefill", prompt_tokens=512, max_tokens=1, chunk_tokens=0, sessions=8, one_by_one=True)
    made = scenario(net, load)
    plan, simulated = rows_of(made, simulate(made))
    assert simulated["ttft_floor_ratio"] <= 1.2  # type: ignore[operator]
    assert simulated["driver_up_bytes"] < 4000  # type: ignore[operator]
    assert plan["chunk_tokens"] == simulated["chunk_tokens"]


def comparable(done: Simulated) -> list[tuple[object, ...]]:
    return [
        (name, run.driver, run.began_s, run.ended_s, run.error, run.stats.token_ids, run.stats.inter_token_s)
        for name, runs in done.runs.items()
        for run in runs
    ]


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    load = Load(sessions=3, every_s=0.2, random=True, max_tokens=10)
    one, again, other = (simulate(scenario("intercontinental", load, seed=seed)) for seed in (3, 3, 4))
    assert comparable(one) == comparable(again)
    assert one.virtual_s == again.virtual_s
    assert comparable(one) != comparable(other)


def test_sessions_follow_traces(tmp_path: Path) -> None:
    for name in "ab":
        out = [ord(name) * n for n in range(1, 9)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"prompt_ids": [1, 2, ord(name)], "out_ids": out}))
    done = simulate(scenario("lan", Load(sessions=3, max_tokens=8, traces=True), traces=str(tmp_path)))
    traces = read_traces(tmp_path)
    assert [run.stats.token_ids for run in done.runs["load"]] == [list(traces[n].out_ids) for n in (0, 1, 0)]


def test_a_link_that_is_cut_and_one_that_falls_silent_change_no_token() -> None:
    faults = (
        Fault(at_s=0.5, kind="cut", a="n1", b="n2"),
        Fault(at_s=1.0, kind="silence", a="n3", b="n4"),
        Fault(at_s=1.4, kind="heal", a="n4", b="n3"),
        Fault(at_s=2.0, kind="cut", a="d1", b="n4"),
    )
    done = simulate(scenario("fiber", Load(max_tokens=40), faults=faults))
    (run,) = done.runs["load"]
    assert (run.error, run.same_tokens, len(run.stats.token_ids)) == ("", True, 40)
    assert run.ended_s > 40 * 0.08 + 0.4


def test_a_crash_is_told_and_sessions_after_it_go_round() -> None:
    before, after = Load(name="before", max_tokens=100), Load(name="after", start_s=30, max_tokens=4)
    whole = simulate(scenario("lan", before, replicas=2))
    route = whole.runs["before"][0].stats.route
    assert route is not None
    victim = whole.node_names[route.hops[2].node_id]
    fault = Fault(at_s=1.0, kind="crash", node=victim)
    done = simulate(scenario("lan", before, after, replicas=2, faults=(fault,)))
    first, second = done.runs["before"][0], done.runs["after"][0]
    assert first.error == "" or first.error.startswith("stage_lost")
    assert first.same_tokens
    assert second.error == ""
    assert second.stats.route is not None
    assert victim not in [done.node_names[hop.node_id] for hop in second.stats.route.hops]


def test_drivers_that_see_some_of_a_swarm_take_different_routes() -> None:
    made = Scenario(
        model=MODEL,
        nodes=(Nodes(stages=4, replicas=8, step_ms=STEP_MS, net=Net(profile="lan")),),
        drivers=(Drivers(count=4, sees=2, net=Net(profile="lan")),),
        load=(Load(sessions=4, max_tokens=2),),
    )
    routes = {run.stats.route for run in simulate(made).runs["load"]}
    assert len(routes) == 4


TOML = """
seed = 7
[model]
name = "tiny"
layers = 4
hidden_size = 64
[[nodes]]
stages = 2
curve_ms = [[1, 2.0], [64, 10.0]]
net = { profile = "cable", rtt_ms = 5 }
[[drivers]]
[[load]]
max_tokens = 3
"""


def test_a_scenario_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(TOML)
    read = read_scenario(path)
    assert (read.seed, read.nodes[0].net.access.up_mbps, read.nodes[0].net.access.rtt_ms) == (7, 20, 5)
    assert simulate(read).runs["load"][0].same_tokens


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("max_tokens", "max_token"), r"max_token.*load\[0\]"),
        (('"cable"', '"kable"'), r"kable.*nodes\[0\]\.net"),
        (("[[load]]", '[[load]]\ncodecs = ["int9"]'), r"int9.*load\[0\]"),
        (("layers = 4", 'layers = "4"'), r"\$\.model\.layers"),
        (("[[load]]", '[[load]]\ndrivers = "x"'), "'x'"),
        (("[[64", "[[0"), None),
        (("[64, 10.0]", "[1, 10.0]"), r"T-curve.*nodes\[0\]"),
        (("[[load]]", '[[faults]]\nat_s = 1\nkind = "crash"\na = "n1"\n[[load]]'), r"crash names a node.*faults\[0\]"),
        (("[[load]]", '[[faults]]\nat_s = 1\nkind = "explode"\n[[load]]'), r"explode.*faults\[0\]"),
        (("seed = 7", "seed = 7\ntraces = 'nowhere'"), "traces.*nowhere"),
        (("seed = 7", "seed = "), "line 2"),
    ],
)
def test_what_is_wrong_with_a_scenario_is_said_with_file_and_key(
    tmp_path: Path, change: tuple[str, str], named: str | None
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(TOML.replace(*change))
    if named is None:
        return
    with pytest.raises(ConfigError, match=named) as caught:
        read_scenario(path)
    assert str(path) in str(caught.value)


SCENARIOS = Path(__file__).parents[2] / "docs" / "scenarios"


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_scenario_of_the_docs_can_be_read(path: Path) -> None:
    assert read_scenario(path).load


@pytest.mark.slow
def test_a_thousand_nodes_and_a_hundred_sessions_give_every_token() -> None:
    done = simulate(read_scenario(SCENARIOS / "thousand-nodes.toml"))
    runs = done.runs["chat"]
    assert sum(len(run.stats.token_ids) for run in runs) == 100 * 100
    assert all(run.same_tokens and not run.error for run in runs)
    assert len({run.stats.route for run in runs}) > 50

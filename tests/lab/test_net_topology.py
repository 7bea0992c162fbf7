"""Networks in words and files, and what the emulator is told of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import UsageError
from farflung.lab.net.check import Measured, judge
from farflung.lab.net.profiles import MODES, NAT_KINDS, PROFILES, Connection, named_connection, parse_settings
from farflung.lab.net.program import change_line, connection_line, pair_line, program, queue_bytes
from farflung.lab.net.topology import LabNode, Topology, inner_address, parse_topology, public_address, read_topology


def words(line: str) -> dict[str, str]:
    return dict(word.split("=") for word in line.split() if "=" in word)


@pytest.mark.parametrize(
    ("name", "up", "down", "rtt", "jitter"),
    [
        ("infiniband", 0, 0, 0, 0),
        ("lan", 1000, 1000, 0.5, 0),
        ("fiber", 100, 1000, 10, 0),
        ("cable", 20, 200, 20, 0),
        ("5g", 20, 100, 30, 0),
        ("intercontinental", 100, 1000, 100, 20),
        ("cable+jittery", 20, 200, 20, 10),
        ("intercontinental+jittery+lossy", 100, 1000, 100, 50),
    ],
)
def test_a_profile_is_what_its_name_promises(name: str, up: float, down: float, rtt: float, jitter: float) -> None:
    found = named_connection(name)
    assert (found.up_mbps, found.down_mbps, found.rtt_ms, found.total_jitter_ms) == (up, down, rtt, jitter)
    assert found.loss_pct == (0.5 if "lossy" in name else 0)


@pytest.mark.parametrize("name", PROFILES)
def test_two_nodes_of_a_profile_share_its_round_trip(name: str) -> None:
    lines = [line for line in program(parse_topology(f"{name}:2")) if line.startswith("set ")]
    assert sum(float(words(line)["access_rtt_ms"]) for line in lines) == PROFILES[name].rtt_ms


def test_a_few_words_make_a_network() -> None:
    nodes = parse_topology("fiber:2,cable+lossy").nodes
    assert [(node.name, node.label) for node in nodes] == [("n1", "fiber"), ("n2", "fiber"), ("n3", "cable+lossy")]


def test_a_file_says_more(tmp_path: Path) -> None:
    path = tmp_path / "wan.toml"
    path.write_text(
        'seed = 7\nmtu = 1400\n[defaults]\nloss_pct = 0.1\n[nodes]\nhome = "cable+jittery"\n'
        'far = { profile = "fiber", rtt_ms = 180, nat = "cone" }\nrack = { profile = "lan", count = 2 }\n'
        '[[pairs]]\nbetween = ["home", "far"]\nbase_rtt_ms = 80\n[sysctl]\n"net.ipv4.tcp_congestion_control" = "bbr"\n'
    )
    lines = program(read_topology(path))
    assert lines[:2] == ("mtu 1400", "seed 7")
    assert "sysctl net.ipv4.tcp_congestion_control bbr" in lines
    assert [line for line in lines if line.startswith("node ")] == [
        "node home 10.77.0.1",
        "node far 10.77.0.2 cone 192.168.2.2",
        "node rack1 10.77.0.3",
        "node rack2 10.77.0.4",
    ]
    far = next(words(line) for line in lines if line.startswith("set far "))
    assert (far["access_rtt_ms"], far["up_mbps"], far["loss_pct"], far["label"]) == ("90", "100", "0.1", "fiber")
    assert lines[-2:] == ("link home far base_rtt_ms=80", "start")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fibre:2", "no network profile 'fibre'"),
        ("fiber+fast", "no mode 'fast'"),
        ("fiber:x", "'x' is no number of nodes"),
        ("fiber:0", "1 to 1000 nodes"),
        ("fiber:1001", "1 to 1000 nodes"),
        ("lan:999999999999", "1 to 1000 nodes"),
    ],
)
def test_words_that_make_no_network_are_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_topology(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes = 3", "nodes of a topology is a table"),
        ("[nodes]\na = 3", "node 'a' is a profile or a table"),
        ("[nodes]\na = {profile = 3}", "profile is a text"),
        ("[nodes]\na = {rate = 3}", "no setting 'rate'"),
        ("[nodes]\na = {up_mbps = -3}", "up_mbps='-3' is no number"),
        ("[nodes]\na = {up_mbps = nan}", "up_mbps='nan' is no number"),
        ("[nodes]\na = {nat = 'double'}", "nat='double' is unknown"),
        ("[nodes]\na = {count = 1001}", "count a number up to 1000"),
        ("[nodes]\n'a b' = 'lan'", "'a b' is no name for a node"),
        ("[nodes]\na = 'lan'\n[[pairs]]\nrtt_ms = 3", "lacks its two nodes"),
        ("[nodes]\na = 'lan'\n[[pairs]]\nbetween = ['a', 'b']", "'b', which is no node"),
        ("[nodes]\na = 'lan'\nb = 'lan'\n[[pairs]]\nbetween = ['a', 'b']\nspeed = 1", "no setting 'speed' of a pair"),
        ("[nodes]\na1 = 'lan'\na = {count = 1}", "two nodes of the lab have the same name"),
        ("[sysctl]\n'kernel.panic' = 1\n[nodes]\na = 'lan'", "cannot be set in a node"),
        ("[sysctl]\n'net.x' = \"1\\nset a\"\n[nodes]\na = 'lan'", "cannot be set in a node"),
        ("speed = 1", "'speed' is no part of a topology"),
        ("seed = -1\n[nodes]\na = 'lan'", "no whole number"),
        ("mtu = 9\n[nodes]\na = 'lan'", "not between 576"),
        ("nodes = [", "is no TOML"),
    ],
)
def test_files_that_make_no_network_are_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "wan.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_topology(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["rtt_ms=400"], {"access_rtt_ms": "200"}),
        (["up_mbps=1"], {"up_mbps": "1", "up_queue": "262144"}),
        (["up_mbps=1000"], {"up_mbps": "1000", "up_queue": "2500000"}),
        (["queue_kb=64"], {"up_queue": "65536", "down_queue": "65536"}),
        (["down_mbps=5", "queue_kb=10"], {"down_mbps": "5", "down_queue": "10240", "up_queue": "10240"}),
        (["cut=1", "keep_order=false"], {"cut": "1", "keep_order": "0"}),
        (["jitter_pct=50", "jitter_distribution=pareto"], {"jitter_pct": "50", "jitter_distribution": "pareto"}),
    ],
)
def test_a_change_tells_the_emulator_that_and_nothing_else(change: list[str], told: dict[str, str]) -> None:
    line = change_line("n3", parse_settings(change))
    assert line.startswith("set n3 ")
    assert words(line) == told


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rtt_ms", "'rtt_ms' is no setting"),
        ("speed=3", "no setting 'speed'"),
        ("rtt_ms=fast", "'fast' is no number"),
        ("loss_pct=101", "'101' is no number"),
        ("loss_burst=0", "'0' is no number"),
        ("cut=maybe", "neither 1 nor 0"),
    ],
)
def test_a_change_that_means_nothing_is_refused(word: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_settings([word])


def test_a_queue_holds_twenty_milliseconds_and_at_least_256_kb() -> None:
    assert (queue_bytes(20, None), queue_bytes(1000, None), queue_bytes(20, 8)) == (262144, 2_500_000, 8192)


def test_only_very_fast_links_carry_super_packets() -> None:
    assert {name for name, connection in PROFILES.items() if connection.offload} == {"infiniband"}
    assert not Connection(up_mbps=20).offload


def test_a_pair_is_set_both_ways() -> None:
    assert pair_line("a", "b", {"cut": 1, "rtt_ms": 2.5}) == "link a b cut=1 rtt_ms=2.5"


@given(st.integers(0, 999), st.integers(0, 999))
def test_no_two_nodes_share_an_address_and_none_ends_in_0_or_255(a: int, b: int) -> None:
    assert (public_address(a) == public_address(b)) == (a == b)
    assert 0 < int(public_address(a).rsplit(".", 1)[1]) < 255
    assert inner_address(a).startswith("192.168.")


@given(
    st.builds(
        Connection,
        up_mbps=st.floats(0, 1e6),
        rtt_ms=st.floats(0, 1e4),
        jitter_pct=st.floats(0, 100),
        nat=st.sampled_from(NAT_KINDS),
        cut=st.booleans(),
    )
)
def test_every_connection_is_one_line_of_keys_and_plain_numbers(connection: Connection) -> None:
    line = connection_line(LabNode("n1", "custom", connection))
    assert "\n" not in line
    told = words(line)
    assert float(told["access_rtt_ms"]) == pytest.approx(connection.rtt_ms / 2, rel=1e-9)
    assert told["cut"] in ("0", "1")


def test_a_topology_of_many_nodes_has_its_place_for_each() -> None:
    lines = program(parse_topology("fiber:1000"))
    assert len({line.split()[2] for line in lines if line.startswith("node ")}) == 1000


def test_modes_change_a_profile_and_keep_its_rates() -> None:
    for name, profile in PROFILES.items():
        for mode in MODES:
            found = named_connection(f"{name}+{mode}")
            assert (found.up_mbps, found.down_mbps, found.rtt_ms) == (profile.up_mbps, profile.down_mbps, profile.rtt_ms)


def figures(name: str, measured: Measured) -> dict[str, bool]:
    return {figure.name: figure.ok for figure in judge(named_connection(name), measured)}


def test_a_network_as_asked_passes_and_another_does_not() -> None:
    steady = [10.2, 10.1, 10.15, 10.3] * 50
    assert all(figures("fiber", Measured(steady, 200, 96.5, None)).values())
    assert figures("fiber", Measured([t + 2 for t in steady], 200, 96.5, None))["rtt_ms"] is False
    assert figures("fiber", Measured(steady, 200, 48.0, None))["rate_mbps"] is False
    assert figures("fiber", Measured(steady[:150], 200, 96.5, None))["lost_pct"] is False
    assert figures("intercontinental", Measured([100.0] * 200, 200, 50, 99.0))["jitter_ms"] is False
    assert all(figures("intercontinental", Measured([80.0, 120.0] * 100, 200, 50, 99.0)).values())


def test_a_probe_that_hardly_answers_fails_by_that_alone() -> None:
    assert figures("fiber", Measured([10.0] * 3, 200, 0, None)) == {"packets_back": False}


def test_names_of_nodes_are_unique() -> None:
    node = LabNode("a", "lan", PROFILES["lan"])
    with pytest.raises(UsageError, match="same name"):
        Topology((node, node))

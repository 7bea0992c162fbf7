"""``farflung lab``: a network that stays, changed and entered from the command line, and gone with its last word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from net_machine import require_lab

from farflung.lab.net.registry import all_folders

pytestmark = pytest.mark.slow


def farflung(*words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "FARFLUNG_DEFAULTS": "off"}
    command = [sys.executable, "-m", "farflung", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environ, check=False)


def told(*words: str) -> dict[str, Any]:
    done = farflung("lab", *words, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(autouse=True)
def _own_labs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    require_lab()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield
    for folder in all_folders():
        folder.sweep()


def test_a_lab_stays_between_commands_is_changed_entered_and_ended() -> None:
    up = told("up", "fiber:2,cable+lossy")
    assert [(node["id"], node["address"], node["label"]) for node in up["nodes"]] == [
        ("n1", "10.77.0.1", "fiber"),
        ("n2", "10.77.0.2", "fiber"),
        ("n3", "10.77.0.3", "cable+lossy"),
    ]
    inside = farflung("lab", "exec", "n2", "--", "sh", "-c", "echo $LAB_ADDRESS; exit 5")
    assert (inside.stdout, inside.returncode) == ("10.77.0.2\n", 5)
    told("set", "n1,n3", "rtt_ms=40", "up_mbps=3")
    told("set", "n2", "profile=5g")
    told("cut", "n1", "n2")
    told("cut", "n3")
    status = told("status")
    nodes = {node["id"]: node for node in status["nodes"]}
    assert [(nodes[name]["rtt_ms"], nodes[name]["up_mbps"]) for name in ("n1", "n2", "n3")] == [(40, 3), (30, 20), (40, 3)]
    assert (status["cuts"], nodes["n3"]["cut"], nodes["n1"]["cut"]) == ([["n1", "n2"], ["n2", "n1"]], True, False)
    told("heal", "n2", "n1")
    told("heal", "n3")
    assert told("status")["cuts"] == []
    assert told("down")["labs"] == ["default"]
    assert told("down")["labs"] == []


def test_what_is_asked_of_no_lab_or_no_node_is_refused_with_a_way_out() -> None:
    missing = farflung("lab", "status")
    assert (missing.returncode, "is not up" in missing.stderr, "farflung lab up" in missing.stderr) == (1, True, True)
    told("up", "lan", "--lab", "mine")
    elsewhere = farflung("lab", "exec", "n1", "--", "true")
    assert "--lab" in elsewhere.stderr
    assert "mine" in elsewhere.stderr
    again = farflung("lab", "up", "lan", "--lab", "mine")
    assert "is up already" in again.stderr
    node = farflung("lab", "set", "n9", "cut=1", "--lab", "mine")
    assert "its nodes: n1" in node.stderr
    nat = farflung("lab", "set", "n1", "nat=cone", "--lab", "mine")
    assert nat.returncode == 2
    assert told("down", "--all")["labs"] == ["mine"]


def test_a_check_measures_each_profile_and_says_what_was_asked() -> None:
    done = farflung("lab", "check", "cable", "--seconds", "1", "--json")
    row = json.loads(done.stdout)["rows"][0]
    assert row["net"] == "cable"
    assert row["rtt_ms"]["asked"] == 20
    assert row["rtt_ms"]["measured"] >= 20
    assert row["rate_mbps"]["measured"] <= 20

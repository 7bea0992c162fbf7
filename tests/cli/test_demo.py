"""The demo, whole: real processes, and nothing left of them however it ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from command_lines import Farflung

MARK = "FARFLUNG_TESTED_DEMO"
GONE_WITHIN_S = 30.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEMO_KEYS = {
    "model",
    "nodes",
    "text",
    "token_ids",
    "decode_tokens_per_s",
    "ttft_s",
    "bytes_per_token",
    "matches_single_process",
    "tokens_compared",
}


def start_demo(mark: str, cache: Path, *arguments: object) -> subprocess.Popen[str]:
    """The demo as a process; its children inherit ``mark``."""
    return subprocess.Popen(
        [sys.executable, "-m", "farflung", "demo", *(str(argument) for argument in arguments), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, MARK: mark, "XDG_CACHE_HOME": str(cache)},
    )


def marked(mark: str) -> list[str]:
    """Command lines of running processes that carry ``mark``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def left_after_a_while(mark: str) -> list[str]:
    """What still runs when all had time to end; returns as soon as nothing does."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def test_the_demo_runs_the_real_model_over_three_processes_with_the_tokens_of_one(cache: Path) -> None:
    demo = start_demo("real", cache)
    out, errors = demo.communicate(timeout=800)
    assert demo.returncode == 0, errors
    found = json.loads(out)
    assert found.keys() >= DEMO_KEYS
    assert [node["layers"] for node in found["nodes"]] == [[0, 6], [6, 12], [12, 18]]
    assert len({node["pid"] for node in found["nodes"]}) == 3
    assert found["matches_single_process"] is True
    assert found["tokens_compared"] == 64
    assert found["bytes_per_token"]["between_stages_max"] <= 640 * 4 + 100
    assert marked("real") == []


def test_the_demo_takes_any_model_and_number_of_nodes(farflung: Farflung, model: Path) -> None:
    found = farflung("demo", "--model", model, "--nodes", 4, "--max-tokens", 5, "--prompt", "The dog", "--json")
    assert found.code == 0, found.stderr
    assert [node["layers"] for node in found.json["nodes"]] == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert found.json["matches_single_process"] is True
    assert all(not psutil.pid_exists(node["pid"]) for node in found.json["nodes"])


def test_more_nodes_than_layers_is_an_error_that_quotes_the_node(farflung: Farflung, model: Path) -> None:
    found = farflung("demo", "--model", model, "--nodes", 5, "--no-compare")
    assert found.code == 1
    assert "error: node " in found.stderr
    assert "4 layers" in found.stderr


def test_a_child_that_dies_early_is_reported_with_what_it_said(farflung: Farflung, tmp_path: Path) -> None:
    found = farflung("demo", "--model", tmp_path / "nothing", "--no-compare", "--json")
    assert found.code == 1
    assert "nothing" in found.json["error"]["message"]


@pytest.mark.skipif(sys.platform == "win32", reason="there a Ctrl-C cannot be sent to one process")
@pytest.mark.parametrize("seed", range(4))
def test_ctrl_c_at_any_moment_leaves_no_process(model: Path, cache: Path, seed: int) -> None:
    demo = start_demo(f"interrupted-{seed}", cache, "--model", model, "--max-tokens", 400, "--prompt", "The")
    wait_s = random.Random(seed).uniform(0.5, 15.0)
    try:
        demo.wait(timeout=wait_s)
    except subprocess.TimeoutExpired:
        demo.send_signal(signal.SIGINT)
    out, errors = demo.communicate(timeout=GONE_WITHIN_S)
    assert demo.returncode in (0, 130), f"after {wait_s:.2f} s: {errors}"
    assert out == "" or demo.returncode == 0
    assert "Traceback" not in errors
    assert marked(f"interrupted-{seed}") == []


@pytest.mark.parametrize("seed", range(4))
def test_kill_9_of_the_parent_at_any_moment_leaves_no_process(model: Path, cache: Path, seed: int) -> None:
    demo = start_demo(f"killed-{seed}", cache, "--model", model, "--max-tokens", 400, "--prompt", "The")
    wait_s = random.Random(100 + seed).uniform(0.5, 15.0)
    try:
        demo.wait(timeout=wait_s)
    except subprocess.TimeoutExpired:
        demo.kill()
    demo.communicate(timeout=GONE_WITHIN_S)
    assert left_after_a_while(f"killed-{seed}") == [], f"after {wait_s:.2f} s"

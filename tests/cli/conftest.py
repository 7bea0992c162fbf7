"""Command lines run in this process, and a real swarm of processes to run them against."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model
from text.small_tokenizers import TEMPLATE, byte_level, write_folder

from farflung.cli.app import run

TIMEOUT_S = 100.0


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as the one JSON object it must be."""
        lines = self.stdout.splitlines()
        assert len(lines) == 1, self.stdout
        found = json.loads(lines[0])
        assert isinstance(found, dict)
        return found


Farflung = Callable[..., Result]


@pytest.fixture(autouse=True)
def _own_defaults(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """No defaults, keys or caches of whoever runs the tests."""
    monkeypatch.setenv("FARFLUNG_DEFAULTS", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("XDG_DATA_HOME", str(cache / "data"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def farflung(capfd: pytest.CaptureFixture[str]) -> Farflung:
    """Runs ``farflung ARGUMENTS`` in this process."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def start(cache: Path, *arguments: object) -> subprocess.Popen[str]:
    """``farflung ARGUMENTS`` as a process that ends with this one."""
    environ = {
        **os.environ,
        "FARFLUNG_DEFAULTS": "off",
        "XDG_CACHE_HOME": str(cache),
        "XDG_DATA_HOME": str(cache / "data"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "farflung", *(str(argument) for argument in arguments), "--exit-with-stdin", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )


def first_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a serving command says when it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        _, errors = process.communicate(timeout=TIMEOUT_S)
        raise AssertionError(f"the process ended with {process.returncode}: {errors}")
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def end(process: subprocess.Popen[str]) -> None:
    """Ends it by closing its stdin, as its parent's death would."""
    try:
        process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random layers with a byte-level tokenizer and a chat template."""
    folder = tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny", layers=4, vocab_size=512)
    return write_folder(folder, byte_level(), TEMPLATE)


@dataclass(frozen=True)
class HandmadeSwarm:
    """A directory and two nodes, each a process, as started by hand."""

    url: str
    directory: subprocess.Popen[str]
    nodes: tuple[subprocess.Popen[str], ...]
    ready: tuple[dict[str, Any], ...]


@pytest.fixture(scope="module")
def swarm(cache: Path, model: Path) -> Iterator[HandmadeSwarm]:
    directory = start(cache, "directory", "--listen", "127.0.0.1:0")
    nodes: list[subprocess.Popen[str]] = []
    try:
        url = first_line(directory)["url"]
        common = ["node", "-d", url, "-m", model, "--dtype", "fp32", "--ephemeral", "--kv-tokens", 256]
        nodes.extend(start(cache, *common, "--layers", layers) for layers in ("0:2", "2:4"))
        yield HandmadeSwarm(url, directory, tuple(nodes), tuple(first_line(node) for node in nodes))
    finally:
        for process in (*nodes, directory):
            end(process)

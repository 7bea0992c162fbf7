"""Command lines as tests run them: in this process or as processes, and a swarm of processes started by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class HandmadeSwarm:
    """A directory and two nodes, each a process, as started by hand."""

    url: str
    directory: subprocess.Popen[str]
    nodes: tuple[subprocess.Popen[str], ...]
    ready: tuple[dict[str, Any], ...]

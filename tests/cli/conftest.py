"""Command lines run in this process, and a real swarm of processes to run them against."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from command_lines import Farflung, HandmadeSwarm, Result, end, first_line, start
from models import tiny_model
from text.small_tokenizers import TEMPLATE, byte_level, write_folder

from farflung.cli.app import run


@pytest.fixture(autouse=True)
def _own_defaults(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """No defaults, keys or logs of whoever runs the tests, and none of theirs for the tests that follow."""
    monkeypatch.setenv("FARFLUNG_DEFAULTS", "off")
    monkeypatch.setenv("XDG_DATA_HOME", str(cache / "data"))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def cache() -> Path:
    """The cache directory of the whole suite (see tests/conftest.py)."""
    return Path(os.environ["XDG_CACHE_HOME"])


@pytest.fixture
def farflung(capfd: pytest.CaptureFixture[str]) -> Farflung:
    """Runs ``farflung ARGUMENTS`` in this process."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random layers with a byte-level tokenizer and a chat template."""
    folder = tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny", layers=4, vocab_size=512)
    return write_folder(folder, byte_level(), TEMPLATE)


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

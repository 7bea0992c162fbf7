"""A private swarm of processes, started as the operations page says: who has the key is served, who has not is told."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_lines import Farflung, end, first_line, start

from farflung.identity.keys import Identity
from farflung.identity.swarm_key import SwarmKey

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class PrivateSwarm:
    url: str
    key: Path
    nodes: tuple[subprocess.Popen[str], ...]
    drivers: Path


@pytest.fixture(scope="module")
def private(cache: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSwarm]:
    """A directory and two nodes with a key; the second serves listed drivers only, of whom there is none yet."""
    folder = tmp_path_factory.mktemp("private")
    key, drivers = folder / "swarm.key", folder / "drivers"
    SwarmKey.generate().write(key)
    drivers.write_text("# nobody yet\n")
    directory = start(cache, "directory", "--listen", "127.0.0.1:0", "--swarm-key", key)
    nodes: list[subprocess.Popen[str]] = []
    try:
        url = first_line(directory)["url"]
        common = ["node", "-d", url, "-m", model, "--dtype", "fp32", "--ephemeral", "--kv-tokens", 256, "--swarm-key", key]
        nodes.append(start(cache, *common, "--layers", "0:2"))
        nodes.append(start(cache, *common, "--layers", "2:4", "--allow", drivers))
        ready = [first_line(node) for node in nodes]
        assert [SwarmKey.read(key).fingerprint in event["serves"] for event in ready] == [True, True]
        yield PrivateSwarm(url, key, tuple(nodes), drivers)
    finally:
        for process in (*nodes, directory):
            end(process)


def test_who_lacks_the_key_or_is_not_listed_is_told_and_who_has_both_is_served(
    farflung: Farflung, private: PrivateSwarm, model: Path, tmp_path: Path
) -> None:
    me = tmp_path / "me.key"
    asked = ["generate", "-d", private.url, "-m", model, "--max-tokens", 4, "--ignore-eos", "--json", "Hello"]

    without = farflung(*asked)
    assert without.code == 1
    assert "no swarm key is set here" in without.stderr
    assert "FARFLUNG_SWARM_KEY" in without.stderr

    other = tmp_path / "other.key"
    SwarmKey.generate().write(other)
    assert farflung(*asked, "--swarm-key", other).code == 1
    assert farflung("status", "-d", private.url, "--swarm-key", other, "--json").json["nodes"] == []
    assert len(farflung("status", "-d", private.url, "--swarm-key", private.key, "--json").json["nodes"]) == 2

    unlisted = farflung(*asked, "--swarm-key", private.key, "--identity", me)
    assert unlisted.code == 1
    assert "not on this node's list" in unlisted.stderr

    if not hasattr(signal, "SIGHUP"):
        return
    private.drivers.write_text(f"{Identity.load_or_create(me).node_id}  # me\n")
    os.kill(private.nodes[1].pid, signal.SIGHUP)
    served = farflung(*asked, "--swarm-key", private.key, "--identity", me)
    assert served.code == 0, served.stderr
    assert len(served.json["token_ids"]) == 4


def test_a_node_without_the_key_is_not_taken_by_the_directory(farflung: Farflung, private: PrivateSwarm, model: Path) -> None:
    refused = farflung("node", "-d", private.url, "-m", model, "--dtype", "fp32", "--layers", "0:2", "--ephemeral")
    assert refused.code == 1
    assert "does not show the key of this directory's swarm" in refused.stderr

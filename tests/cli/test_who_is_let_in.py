"""Keys, lists and openness on the command line: what is asked for before a node serves, and what is never printed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
from pathlib import Path

import pytest
from command_lines import Farflung

from farflung.cli.app import repeatable_options, run
from farflung.cli.config import as_default_map, gather
from farflung.cli.state import driver_identity
from farflung.cli.stopping import on_hangup
from farflung.core.errors import UsageError
from farflung.identity.swarm_key import SwarmKey


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "swarm.key"
    SwarmKey.generate().write(path)
    return path


def test_a_new_key_is_written_for_its_user_alone_and_shown_by_its_fingerprint(farflung: Farflung, tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    made = farflung("key", "new", path, "--json")
    assert made.code == 0
    key = SwarmKey.read(path)
    assert made.json == {"path": str(path), "fingerprint": key.fingerprint}
    assert key.text not in made.stdout + made.stderr
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert farflung("key", "show", path).stdout.strip() == key.fingerprint
    assert farflung("key", "show", path, "--reveal").stdout.strip() == key.text
    again = farflung("key", "new", path)
    assert again.code == 2
    assert "hint:" in again.stderr
    assert SwarmKey.read(path) == key


def test_a_drivers_id_stays_the_same(farflung: Farflung, tmp_path: Path) -> None:
    first, second = (farflung("key", "id", tmp_path / "me.key").stdout.strip() for _ in range(2))
    assert first == second
    assert len(first) == 64


@pytest.mark.parametrize("listening", [["--listen", "0.0.0.0:0"], ["--advertise", "203.0.113.9:7800"], ["--listen", "[::]:0"]])
def test_a_node_that_strangers_can_reach_must_say_whom_it_serves(farflung: Farflung, listening: list[str]) -> None:
    refused = farflung("node", "-m", "gemma3-270m", *listening)
    assert refused.code == 2
    for way_out in ("--swarm-key", "--allow", "--open-to-anyone"):
        assert way_out in refused.stderr


@pytest.mark.parametrize(
    "allowed", [["--swarm-key", "KEY"], ["--allow", "a" * 64], ["--allow", "a" * 64 + ","], ["--open-to-anyone"]]
)
def test_a_node_that_says_whom_it_serves_goes_on_to_its_model(
    farflung: Farflung, allowed: list[str], key_file: Path, tmp_path: Path
) -> None:
    arguments = [str(key_file) if word == "KEY" else word for word in allowed]
    result = farflung("node", "-m", tmp_path / "no-model", "--listen", "0.0.0.0:0", "--ephemeral", *arguments)
    assert "no-model" in result.stderr


def test_a_list_that_cannot_be_read_or_contradicts_is_wrong_usage(farflung: Farflung) -> None:
    assert farflung("node", "-m", "x", "--allow", "nobody").code == 2
    assert "--allow names nobody" in farflung("node", "-m", "x", "--allow", ", ").stderr
    both = farflung("node", "-m", "x", "--allow", "a" * 64, "--open-to-anyone")
    assert both.code == 2
    assert "not both" in both.stderr


def test_a_key_with_a_typo_is_told_and_not_printed(farflung: Farflung, key_file: Path) -> None:
    text = SwarmKey.read(key_file).text
    for wrong in (text[:-1], text[:-1] + ("a" if text[-1] != "a" else "b"), text.removeprefix("farflung-")):
        result = farflung("generate", "-m", "x", "--swarm-key", wrong, "hello")
        assert result.code == 1
        assert "swarm key" in result.stderr
        assert wrong not in result.stderr


def test_the_key_comes_from_variables_and_files_and_is_shown_by_name_only(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], key_file: Path, tmp_path: Path
) -> None:
    key = SwarmKey.read(key_file)
    monkeypatch.delenv("FARFLUNG_DEFAULTS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for set_by_variable in (True, False):
        if set_by_variable:
            monkeypatch.setenv("FARFLUNG_SWARM_KEY", key.text)
        else:
            monkeypatch.delenv("FARFLUNG_SWARM_KEY")
            (tmp_path / "farflung.toml").write_text(f"[all]\nswarm_key = '{key_file}'\n")
        assert run(["config", "show", "--json"]) == 0
        shown = capfd.readouterr().out
        assert key.text not in shown
        assert {row["command"] for row in json.loads(shown)["settings"]} >= {"node", "generate", "chat", "doctor"}
        run(["doctor", "--json"])
        checks = {check["name"]: check for check in json.loads(capfd.readouterr().out)["checks"]}
        assert checks["swarm key"]["ok"]
        assert key.fingerprint in checks["swarm key"]["detail"]


def test_an_option_that_may_be_repeated_can_be_set_by_a_variable() -> None:
    schema = {("node",): frozenset({"allow", "listen"})}
    settings = gather([], {"FARFLUNG_ALLOW": "drivers", "FARFLUNG_LISTEN": "127.0.0.1:0"}, schema)
    made = as_default_map(settings, repeatable_options())
    assert made == {"node": {"allow": ["drivers"], "listen": "127.0.0.1:0"}}


def test_one_key_is_one_driver_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "me.key"
    with driver_identity(path) as one, pytest.raises(UsageError, match=r"me\.key"), driver_identity(path):
        pass
    with driver_identity(path) as same, driver_identity(None) as other:
        assert same.node_id == one.node_id != other.node_id


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="SIGHUP is POSIX")
def test_a_hangup_is_heard_while_the_block_runs_and_left_as_it_was_after() -> None:
    async def scenario() -> None:
        before, heard = signal.getsignal(signal.SIGHUP), asyncio.Event()
        with on_hangup(heard.set):
            os.kill(os.getpid(), signal.SIGHUP)
            async with asyncio.timeout(5):
                await heard.wait()
        assert signal.getsignal(signal.SIGHUP) == before
        with on_hangup(None):
            assert signal.getsignal(signal.SIGHUP) == before

    asyncio.run(scenario())

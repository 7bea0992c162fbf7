"""What every command keeps to: help that teaches, exit codes, errors with hints, JSON and nothing else on stdout."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import structlog
from command_lines import TIMEOUT_S, Farflung, first_line, start

from farflung import __version__
from farflung.cli.app import option_names
from farflung.cli.output import command

COMMANDS = sorted(" ".join(path) for path in option_names())

PROBE = "import sys\nfrom farflung.cli.app import run\nrun({arguments})\nprint(*sorted(m for m in {heavy} if m in sys.modules))"


def test_the_commands_are_those_that_scripts_rely_on() -> None:
    assert set(COMMANDS) >= {
        "demo",
        "directory",
        "node",
        "generate",
        "chat",
        "status",
        "bench stage",
        "models list",
        "models inspect",
        "models fetch",
        "doctor",
        "config show",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_an_example_of_it(farflung: Farflung, command: str) -> None:
    found = farflung(*command.split(), "--help")
    assert found.code == 0
    assert "Examples:" in found.stdout
    assert f"farflung {command}" in found.stdout
    assert "--json" in found.stdout
    assert "--debug" in found.stdout
    assert "stdin" not in found.stdout.replace("reads it from stdin", "")  # hidden options stay hidden


@pytest.mark.parametrize("command", ["--help", *(f"{command} --help" for command in COMMANDS)])
def test_help_brings_in_nothing_heavy(command: str) -> None:
    heavy = ["torch", "transformers", "numpy", "httpx2", "cryptography", "uvicorn", "structlog", "asyncio"]
    script = PROBE.format(arguments=command.split(), heavy=heavy[:-1])
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    assert found.stdout.splitlines()[-1] == "", found.stdout.splitlines()[-1]


def test_version_says_the_version(farflung: Farflung) -> None:
    assert farflung("--version").stdout == f"farflung {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate"], "PROMPT"),
        (["node"], "--model"),
        (["nonsense"], "nonsense"),
        (["doctor", "--nonsense"], "--nonsense"),
        (["generate", "-d", "http://127.0.0.1:1", "-m", "x", "--max-tokens", "none", "hi"], "--max-tokens"),
        (["generate", "-d", "http://127.0.0.1:1", "-m", "x", "--codec", "zip", "hi"], "--codec"),
        (["generate", "-d", "http://127.0.0.1:1", "-m", "x", "--speculate", "draft", "hi"], "--speculate draft"),
        (["generate", "-d", "http://127.0.0.1:1", "-m", "x", "--temperature", "-1", "hi"], "--temperature"),
        (["node", "-d", "http://127.0.0.1:1", "-m", "x", "--dtype", "int3"], "--dtype 'int3' is unknown"),
        (["node", "-d", "http://127.0.0.1:1", "-m", "x", "--listen", "here"], "here"),
        (["status", "-d", "not a url"], "not a url"),
        (["directory", "--listen", "1"], "'1'"),
        (["demo", "--prompt", " "], "prompt"),
    ],
)
def test_wrong_usage_ends_with_2_an_error_and_a_hint(farflung: Farflung, arguments: list[str], named: str) -> None:
    found = farflung(*arguments)
    assert found.code == 2, found.stderr
    assert found.stdout == ""
    error, *rest = found.stderr.splitlines()
    assert error.startswith("error: ")
    assert named in error
    assert any(line.startswith("hint: ") for line in rest), found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["status", "-d", "http://127.0.0.1:1"], "directory_unreachable"),
        (["models", "inspect", "/nowhere/at/all"], "not_a_model"),
        (["generate", "-d", "http://127.0.0.1:1", "-m", "/nowhere/at/all", "hi"], "not_a_model"),
    ],
)
def test_a_failure_ends_with_1_and_is_json_as_well_where_that_was_asked_for(
    farflung: Farflung, arguments: list[str], code: str
) -> None:
    plain = farflung(*arguments)
    assert (plain.code, plain.stdout) == (1, "")
    assert plain.stderr.startswith("error: ")
    machine = farflung(*arguments, "--json")
    assert machine.code == 1
    error = machine.json["error"]
    assert error["code"] == code
    assert f"error: {error['message']}" in machine.stderr
    assert f"hint: {error['hint']}" in machine.stderr


def test_a_folder_that_is_no_model_is_refused_by_every_command_that_takes_one(farflung: Farflung, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a model")
    for arguments in (["models", "inspect", tmp_path], ["node", "-d", "http://127.0.0.1:1", "-m", tmp_path, "--ephemeral"]):
        found = farflung(*arguments)
        assert found.code == 1
        assert str(tmp_path) in found.stderr
        assert "hint: " in found.stderr


def test_debug_adds_a_traceback(farflung: Farflung) -> None:
    found = farflung("models", "inspect", "/nowhere/at/all", "--debug")
    assert "Traceback" in found.stderr
    assert "\nerror: " in found.stderr


def test_doctor_prints_one_object_with_a_hint_for_all_that_is_wrong(farflung: Farflung) -> None:
    found = farflung("doctor", "--listen", "127.0.0.1:99999", "--json")
    checks = found.json["checks"]
    assert found.code == 1
    assert {check["name"] for check in checks} >= {"python", "torch", "memory", "cache", "link", "port", "models", "clock"}
    assert all(set(check) == {"name", "ok", "detail", "hint"} for check in checks)
    assert all(check["hint"] for check in checks if not check["ok"])
    assert not next(check for check in checks if check["name"] == "port")["ok"]


def test_models_list_says_what_is_here(farflung: Farflung) -> None:
    models = farflung("models", "list", "--json").json["models"]
    assert "gemma3-270m" in {model["name"] for model in models}
    assert all(model["state"] in ("ready", "installed", "absent") for model in models)


def test_models_inspect_gives_the_sizes_of_a_folder(farflung: Farflung, model: Path) -> None:
    found = farflung("models", "inspect", model, "--json").json
    assert (found["family"], found["layers"], found["hidden_size"]) == ("llama", 4, 128)
    assert found["activation_bytes_per_token"]["fp32"] == 128 * 4
    assert found["kv_bytes_per_token_and_layer"]["bf16"] == 2 * 2 * 32 * 2  # keys and values, 2 heads of width 32, 2 bytes
    assert found["kv_bytes_per_token"]["bf16"] == 4 * 2 * 2 * 32 * 2
    assert len(found["digest"]) == 64
    assert found["splittable"] is True
    assert found["reason"] is None


def test_models_inspect_says_why_a_model_cannot_be_split(farflung: Farflung, tmp_path: Path) -> None:
    from models import tiny_model

    found = farflung("models", "inspect", tiny_model("nanochat", tmp_path), "--json").json
    assert found["splittable"] is False
    assert "'nanochat' cannot be split" in found["reason"]
    assert found["layers"] is None


def test_models_fetch_makes_a_folder_ready(farflung: Farflung, model: Path) -> None:
    found = farflung("models", "fetch", model, "--json").json
    assert found["path"] == str(model)


def test_config_show_says_where_each_value_stands(farflung: Farflung, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FARFLUNG_DEFAULTS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("FARFLUNG_SEED", "7")
    monkeypatch.setenv("FARFLUNG_SEEED", "7")
    monkeypatch.chdir(tmp_path)
    Path("farflung.toml").write_text("[generate]\nmax-tokens = 3\n")
    found = farflung("config", "show", "--json").json
    rows = {(row["command"], row["option"]): (row["value"], row["origin"]) for row in found["settings"]}
    assert rows["generate", "max_tokens"] == (3, f"{tmp_path / 'farflung.toml'} [generate] max-tokens")
    assert rows["chat", "seed"] == ("7", "FARFLUNG_SEED")
    assert found["unused_variables"] == ["FARFLUNG_SEEED"]


def test_a_default_that_is_refused_is_traced_to_where_it_stands(
    farflung: Farflung, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FARFLUNG_DEFAULTS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    Path("farflung.toml").write_text("[all]\nmax-tokens = 'many'\ndirectory = 'http://127.0.0.1:1'\nmodel = 'x'\n")
    found = farflung("generate", "hi")
    assert found.code == 2
    assert "--max-tokens" in found.stderr
    assert f"hint: the value 'many' comes from {tmp_path / 'farflung.toml'} [all] max-tokens" in found.stderr.replace("\n", " ")
    Path("farflung.toml").write_text("[generate]\nmax-token = 3\n")
    found = farflung("generate", "hi")
    assert found.code == 2
    assert "hint: did you mean 'max_tokens'?" in found.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="there a Ctrl-C cannot be sent to one process")
def test_ctrl_c_ends_a_waiting_command_with_130_and_without_a_traceback(cache: Path) -> None:
    directory = start(cache, "directory", "--listen", "127.0.0.1:0")
    first_line(directory)
    directory.send_signal(signal.SIGINT)
    out, errors = directory.communicate(timeout=TIMEOUT_S)
    assert directory.returncode == 130
    assert out == ""
    assert "Traceback" not in errors


def test_a_process_whose_parent_is_gone_ends(cache: Path) -> None:
    directory = start(cache, "directory", "--listen", "127.0.0.1:0")
    assert json.dumps(first_line(directory)["url"])
    assert directory.stdin is not None
    started = time.monotonic()
    directory.stdin.close()
    directory.wait(timeout=TIMEOUT_S)
    assert time.monotonic() - started < TIMEOUT_S


def test_logs_go_to_stderr_as_it_is_when_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    closed, later = io.StringIO(), io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", closed)
        with command(json=False, debug=False):
            pass
    closed.close()
    monkeypatch.setattr(sys, "stderr", later)
    structlog.get_logger("any").warning("directory lost")
    assert "directory lost" in later.getvalue()

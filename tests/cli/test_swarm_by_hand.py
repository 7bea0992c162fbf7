"""A directory, nodes and a driver started by hand, each a process: what a person does in four terminals."""

from __future__ import annotations

import io
import json
import signal
import socket
import sys
from pathlib import Path

import pytest
from command_lines import TIMEOUT_S, Farflung, HandmadeSwarm, first_line, start

PROMPT = "The quick brown fox"


def test_the_first_line_of_directory_and_node_says_ready(swarm: HandmadeSwarm) -> None:
    for event, layers in zip(swarm.ready, ([0, 2], [2, 4]), strict=True):
        assert event["event"] == "ready"
        assert event["layers"] == layers
        assert len(event["node_id"]) == 64
        assert event["listen"].startswith("127.0.0.1:")
        assert not event["listen"].endswith(":0")


def test_generate_gives_the_tokens_of_plain_transformers_as_one_json_object(
    farflung: Farflung, swarm: HandmadeSwarm, model: Path
) -> None:
    import torch
    from models import whole_model

    found = farflung(
        "generate", "-d", swarm.url, "-m", model, "--max-tokens", 12, "--codec", "fp32", "--ignore-eos", "--json", PROMPT
    )
    assert found.code == 0, found.stderr
    value = found.json
    from farflung.engine.open_model import open_source
    from farflung.text.tokenizer import Tokenizer

    ids = torch.tensor([Tokenizer(*open_source(str(model)).tokenizer_arguments()).encode(PROMPT)])
    plain = whole_model(model)
    plain.generation_config.eos_token_id = None
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert value["token_ids"] == expected[0, ids.shape[1] :].tolist()
    assert value["finish_reason"] == "length"
    assert [hop["layers"] for hop in value["route"]] == [[0, 2], [2, 4]]
    assert [hop["id"] for hop in value["route"]] == [event["node_id"] for event in swarm.ready]
    assert value["rounds"] == 12
    assert value["accepted_per_round"] == 1.0
    assert value["repairs"] == []
    assert value["inter_token_ms"]["p50"] <= value["inter_token_ms"]["p95"]
    assert 512 <= value["bytes_per_token"]["between_stages_max"] <= 700  # 128 values of fp32, and a frame around them


def test_generate_prints_the_text_on_stdout_and_the_summary_on_stderr(
    farflung: Farflung, swarm: HandmadeSwarm, model: Path
) -> None:
    text = farflung("generate", "-d", swarm.url, "-m", model, "--max-tokens", 8, "--json", PROMPT).json["text"]
    found = farflung("generate", "-d", swarm.url, "-m", model, "--max-tokens", 8, PROMPT)
    assert found.code == 0
    assert found.stdout == text + "\n"
    assert "ring" in found.stderr
    assert "tokens/s" in found.stderr


def test_a_dash_reads_the_prompt_from_stdin(
    farflung: Farflung, swarm: HandmadeSwarm, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = farflung("generate", "-d", swarm.url, "-m", model, "--max-tokens", 8, "--json", PROMPT).json
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    piped = farflung("generate", "-d", swarm.url, "-m", model, "--max-tokens", 8, "--json", "-").json
    assert piped["token_ids"] == said["token_ids"]


def test_chat_answers_each_piped_line_and_remembers_until_it_is_reset(
    farflung: Farflung, swarm: HandmadeSwarm, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("dog\nfox\n/reset\ndog\n/exit\nnever said\n"))
    found = farflung("chat", "-d", swarm.url, "-m", model, "--max-tokens", 5, "--json")
    assert found.code == 0, found.stderr
    answers = [json.loads(line) for line in found.stdout.splitlines()]
    assert [answer["role"] for answer in answers] == ["assistant"] * 3
    assert answers[1]["prompt_tokens"] > answers[0]["prompt_tokens"]  # the second prompt holds the first exchange
    assert answers[2]["token_ids"] == answers[0]["token_ids"]


def test_status_shows_who_serves_what_and_that_nothing_is_missing(
    farflung: Farflung, swarm: HandmadeSwarm, model: Path
) -> None:
    found = farflung("status", "-d", swarm.url, "--json").json
    assert [node["id"] for node in found["nodes"]] == [event["node_id"] for event in swarm.ready]
    assert found["coverage"] == [
        {"model": "tiny", "digest": found["models"][0]["digest"], "layers": [0, 4], "nodes": 1},
    ]
    assert found["models"][0]["complete"]
    assert found["links"] == []
    shown = farflung("status", "-d", swarm.url).stdout
    assert "##.." in shown
    assert "..##" in shown
    assert "every layer is served" in shown


def test_doctor_reaches_the_directory_and_finds_the_clocks_agree(farflung: Farflung, swarm: HandmadeSwarm) -> None:
    checks = {check["name"]: check for check in farflung("doctor", "-d", swarm.url, "--json").json["checks"]}
    assert checks["directory"]["ok"], checks["directory"]
    assert checks["link"]["ok"], checks["link"]


def test_a_prompt_that_does_not_fit_the_lease_is_an_error_that_says_what_is_free(
    farflung: Farflung, swarm: HandmadeSwarm, model: Path
) -> None:
    found = farflung("generate", "-d", swarm.url, "-m", model, "--max-tokens", 300, "--json", PROMPT)
    assert found.code == 1
    assert "256" in found.stderr
    assert "hint: " in found.stderr
    assert found.json["error"]["message"] in found.stderr.replace("\n", " ")


@pytest.mark.parametrize("command", ["node", "directory"])
def test_a_port_in_use_is_an_error_with_a_hint(farflung: Farflung, swarm: HandmadeSwarm, model: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        more = ["-d", swarm.url, "-m", model, "--ephemeral"] if command == "node" else []
        found = farflung(command, *more, "--listen", listen)
    assert found.code == 1
    assert f"error: {listen}" in found.stderr
    assert "hint: " in found.stderr


def test_another_models_digest_is_refused_before_anything_is_loaded(
    farflung: Farflung, swarm: HandmadeSwarm, model: Path
) -> None:
    found = farflung("node", "-d", swarm.url, "-m", model, "--model-digest", "0" * 64, "--ephemeral", "--json")
    assert found.code == 1
    assert found.json["error"]["code"] == "digest_mismatch"
    assert "loading" not in found.stderr


def test_layers_beyond_the_model_are_wrong_usage(farflung: Farflung, swarm: HandmadeSwarm, model: Path) -> None:
    found = farflung("node", "-d", swarm.url, "-m", model, "--layers", "2:5", "--ephemeral")
    assert found.code == 2
    assert "0:4" in found.stderr


def test_a_second_node_with_the_same_state_is_refused(
    farflung: Farflung, swarm: HandmadeSwarm, model: Path, tmp_path: Path
) -> None:
    from farflung.cli.state import claimed_identity

    with claimed_identity(tmp_path, ephemeral=False):
        found = farflung("node", "-d", swarm.url, "-m", model, "--state", tmp_path)
    assert found.code == 2
    assert str(tmp_path) in found.stderr.replace("\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process can handle")
def test_a_node_told_to_end_leaves_in_order_and_what_it_served_is_missing_then(
    farflung: Farflung, swarm: HandmadeSwarm, model: Path, cache: Path
) -> None:
    extra = start(cache, "node", "-d", swarm.url, "-m", model, "--dtype", "fp32", "--ephemeral", "--kv-tokens", 256)
    assert first_line(extra)["layers"] == [0, 4]  # every range is served, so auto takes what can stand in for all
    extra.send_signal(signal.SIGTERM)
    _, errors = extra.communicate(timeout=TIMEOUT_S)
    assert extra.returncode == 0, errors
    assert "draining" in errors

    swarm.nodes[0].send_signal(signal.SIGINT)
    swarm.nodes[0].wait(timeout=TIMEOUT_S)
    assert swarm.nodes[0].returncode == 130
    found = farflung("generate", "-d", swarm.url, "-m", model, PROMPT)
    assert found.code == 1
    assert "error: layers 0:2 of 4 are missing" in found.stderr
    assert "hint: add what is missing: farflung node" in found.stderr

"""A whole swarm of processes over the emulated network: the tokens are right, and the row is whole."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from net_machine import require_lab

from farflung.lab.bench.case import Case
from farflung.lab.bench.decode import decode
from farflung.lab.net.profiles import named_connection
from farflung.lab.net.registry import all_folders

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_replayed_model_decodes_over_a_lossy_line_and_every_token_is_its_path_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_lab()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    line = named_connection("cable+lossy")
    row, _ = asyncio.run(decode(Case(net="cable+lossy", connection=line, backend="replay", stages=2, tokens=24, repeats=1)))
    assert row["same_tokens"] is True
    assert row["net"] == "cable+lossy"
    assert all_folders() == []

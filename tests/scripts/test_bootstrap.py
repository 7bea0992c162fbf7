"""The script behind `make`: what it does when an earlier run was cut short."""

from __future__ import annotations

import importlib.util
import subprocess
import venv
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/bootstrap.py"


@pytest.mark.slow
def test_an_environment_that_was_cut_short_before_it_had_pip_is_made_anew(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    bootstrap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    folder = tmp_path / ".venv"
    python = folder / bootstrap.PYTHON.relative_to(bootstrap.VENV)
    venv.create(folder, with_pip=False)
    bootstrap.make_venv(folder, python, installed=False)
    subprocess.run([python, "-c", "import pip"], check=True)
    kept = folder / "kept"
    kept.touch()
    bootstrap.make_venv(folder, python, installed=False)
    assert kept.exists()

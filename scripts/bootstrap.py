"""Makes .venv and installs Farflung into it; does nothing when that is done already. Standard library only, any platform.

usage: python scripts/bootstrap.py [EXTRA ...]      (extras of pyproject.toml: demo, dev)

Torch comes first and by itself: where there is no NVIDIA GPU, the ordinary Linux wheel would bring gigabytes of CUDA, so the
CPU build is taken from the package index if it is there, else from PyTorch's own index.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "farflung-installed.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(extras: list[str]) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - this runs before anything has checked
        print(f"error: Farflung needs Python 3.11 or newer, this is {platform.python_version()}", file=sys.stderr)
        print("hint: make PYTHON=python3.12 ... names another one", file=sys.stderr)
        return 1
    wanted = sorted(set(extras) | _installed_extras())
    fingerprint = f"{' '.join(wanted)} {_fingerprint()}"
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == fingerprint:
        return 0
    make_venv(VENV, PYTHON, installed=STAMP.exists())
    code = _install(wanted)
    if code == 0:
        STAMP.write_text(fingerprint)
    return code


def make_venv(folder: Path, python: Path, *, installed: bool) -> None:
    """A virtual environment with pip; made anew where an earlier try was cut short and left one without."""
    if python.exists() and (installed or _imports_pip(python)):
        return
    print("making .venv", flush=True)
    venv.create(folder, with_pip=True, clear=folder.exists())


def _imports_pip(python: Path) -> bool:
    return subprocess.run([str(python), "-c", "import pip"], capture_output=True, check=False).returncode == 0


def _install(extras: list[str]) -> int:
    torch = next(line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch=="))
    if not _has(torch):
        code = _install_torch(torch)
        if code != 0:
            return code
    target = f".[{','.join(extras)}]" if extras else "."
    print(f"installing farflung {target[1:]} and what it needs", flush=True)
    return _pip("-c", "constraints.txt", "-e", target)


def _install_torch(torch: str) -> int:
    if platform.system() != "Linux" or shutil.which("nvidia-smi"):
        print(f"installing {torch}", flush=True)
        return _pip(torch)
    print(f"installing {torch}, the CPU build (no nvidia-smi here)", flush=True)
    if _pip(f"{torch}+cpu", quiet=True) == 0:
        return 0
    return _pip(f"{torch}+cpu", "--index-url", TORCH_CPU_INDEX, "--extra-index-url", "https://pypi.org/simple")


def _pip(*arguments: str, quiet: bool = False) -> int:
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, stderr=subprocess.DEVNULL if quiet else None).returncode


def _has(requirement: str) -> bool:
    name, version = requirement.split("==")
    probe = f"import importlib.metadata as m; print(m.version({name!r}).split('+')[0] == {version!r})"
    result = subprocess.run([str(PYTHON), "-c", probe], capture_output=True, text=True, check=False)
    return result.stdout.strip() == "True"


def _installed_extras() -> set[str]:
    if not STAMP.exists():
        return set()
    return set(STAMP.read_text().split()[:-1])


def _fingerprint() -> str:
    """Changes when an install would do something: dependencies, not every line of the project file."""
    text = (ROOT / "pyproject.toml").read_text().split("[tool.ruff]")[0] + (ROOT / "constraints.txt").read_text()
    return hashlib.sha256(re.sub(r"\s+", " ", text).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

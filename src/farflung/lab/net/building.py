"""The emulator's binary: C files of this package, built on first use into the user's cache.

It moves up to a hundred thousand packets a second, each at its own time to some tens of microseconds: no work for Python, and
the kernel's own emulator (netem) is a module that many machines lack.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from farflung.core.errors import LabUnavailable

SOURCES = Path(__file__).with_name("emulator")
BUILD_TIMEOUT_S = 120.0
COMPILERS = ("cc", "gcc", "clang")


def emulator_binary() -> Path:
    """The built emulator. Raises LabUnavailable: no Linux, no compiler, or one that fails."""
    if not sys.platform.startswith("linux"):
        raise LabUnavailable(
            f"the emulated network needs Linux; this is {sys.platform}",
            hint="run it in a Linux virtual machine or container",
        )
    files = sorted(SOURCES.glob("*.[ch]"))
    digest = hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()
    binary = platformdirs.user_cache_path("farflung", appauthor=False) / "lab" / f"wan-{digest}"
    if not binary.exists():
        build([str(file) for file in files if file.suffix == ".c"], binary, _compiler())
    return binary


def build(sources: Sequence[str], binary: Path, compiler: Sequence[str]) -> None:
    """Compiles ``sources``; the result appears whole or not at all. Raises LabUnavailable."""
    unfinished = binary.with_name(f"{binary.name}.{os.getpid()}")
    try:
        binary.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [*compiler, "-O2", "-o", str(unfinished), *sources, "-lm"],
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            said = "\n  ".join(done.stderr.strip().splitlines()[:12])
            raise LabUnavailable(
                f"{compiler[0]} cannot build the network emulator; it says:\n  {said}",
                hint="it needs the headers of libc and Linux (Debian: apt install build-essential)",
            )
        unfinished.replace(binary)
    except OSError as error:
        raise LabUnavailable(f"the network emulator cannot be built at {binary}: {error}") from error
    except subprocess.TimeoutExpired:
        raise LabUnavailable(f"{compiler[0]} has not built the network emulator within {BUILD_TIMEOUT_S:.0f} s") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _compiler() -> list[str]:
    wanted = os.environ.get("CC", "").split()
    for words in [wanted] if wanted else [[name] for name in COMPILERS]:
        if shutil.which(words[0]):
            return words
    raise LabUnavailable(
        f"there is no C compiler ({' '.join(wanted) or ', '.join(COMPILERS)}), and the network emulator is built on first use",
        hint="install one (Debian and Ubuntu: apt install build-essential; Fedora: dnf install gcc), or name it in CC",
    )

"""Where running labs are kept: a folder for each in the user's runtime folder, with the emulator's socket and the lab's mark.

The mark is a random text in the environment of everything that was started inside. What a crash left behind is found by it, and
nothing else is ever mistaken for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from farflung.core.errors import LabError, LabUnavailable, UsageError

MARK = "LAB_MARK"
"""The environment variable that holds a lab's mark."""

END_TIMEOUT_S = 10.0
LONGEST_SOCKET = 100


@dataclass(frozen=True)
class LabFolder:
    """The folder of one lab."""

    name: str
    path: Path

    @property
    def socket(self) -> Path:
        return self.path / "control"

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def mark(self) -> str:
        """Raises LabError where the lab is not there."""
        try:
            return (self.path / "mark").read_text()
        except OSError:
            raise not_up(self.name) from None

    @property
    def pid(self) -> int | None:
        """Of its emulator, as long as that is ours and lives."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.path / "pid").read_text())
            if str(self.socket).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
        return None

    def create(self) -> str:
        """Makes the folder; the new lab's mark. Raises LabError where one of that name runs."""
        try:
            self.path.mkdir(parents=True, mode=0o700)
        except FileExistsError:
            if self.pid is not None:
                raise LabError(
                    f"lab {self.name!r} is up already", hint="end it with 'farflung lab down', or give this one --lab NAME"
                ) from None
            self.sweep()
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise LabUnavailable(f"{self.path} cannot be made: {error.strerror}") from error
        mark = secrets.token_hex(16)
        (self.path / "mark").write_text(mark)
        return mark

    def sweep(self) -> list[int]:
        """Ends the emulator and all that was started inside, and removes the folder. Returns the processes it had to kill."""
        killed: list[int] = []
        if (pid := self.pid) is not None:
            _end(pid)
        with contextlib.suppress(LabError):
            mark = self.mark
            while found := list(_marked(mark)):  # what was started during one look is found by the next
                for pid in found:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                killed += [pid for pid in found if pid not in killed]
                time.sleep(0.01)
        shutil.rmtree(self.path, ignore_errors=True)
        return killed


def lab_folder(name: str) -> LabFolder:
    """Raises UsageError for a name that is none."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
        raise UsageError(f"{name[:60]!r} is no name for a lab", hint="letters, digits, - and _, at most 40 of them")
    folder = LabFolder(name, _root() / name)
    if len(str(folder.socket)) > LONGEST_SOCKET:
        raise UsageError(f"{folder.socket} is too long for a socket", hint="set XDG_RUNTIME_DIR to a shorter folder")
    return folder


def all_folders() -> list[LabFolder]:
    """Every lab of this user, running or left behind."""
    root = _root()
    return [LabFolder(path.name, path) for path in sorted(root.iterdir())] if root.is_dir() else []


def not_up(name: str) -> LabError:
    return LabError(f"lab {name!r} is not up", hint="start it with 'farflung lab up', e.g. farflung lab up fiber:2,cable")


def _root() -> Path:
    """This user's own: another one must not be able to hand us pids and sockets."""
    base = os.environ.get("XDG_RUNTIME_DIR") or str(Path(tempfile.gettempdir()) / f"runtime-{os.getuid()}")
    root = Path(base) / "farflung" / "lab"
    for path in (root.parent.parent, root.parent, root):
        if path.exists() and path.stat().st_uid != os.getuid():
            raise LabError(f"{path} belongs to another user", hint="set XDG_RUNTIME_DIR to a folder of your own")
    return root


def _end(pid: int) -> None:
    """SIGTERM lets the emulator end what runs inside first."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < until and _running(pid):
            time.sleep(0.01)
        if _running(pid):
            os.kill(pid, signal.SIGKILL)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _marked(mark: str) -> Iterator[int]:
    """Processes with ``mark`` in their environment."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0") and _running(int(entry.name)):
                    yield int(entry.name)

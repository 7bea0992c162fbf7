"""A process inside a node of the lab: its output as lines or whole, and a certain end."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass
from typing import Any

from farflung.core.errors import DeadlineExceeded, LabError

END_TIMEOUT_S = 8.0
"""From closing a process's stdin to killing it."""

STDERR_LINES = 200
MAX_LINE_BYTES = 16 * 1024**2


@dataclass(frozen=True)
class Finished:
    """What a process said and how it ended."""

    code: int
    stdout: str
    stderr: str


class LabProcess:
    """One running process. Made by ``Lab.start``; its stdin stays open until ``end``."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._reader = asyncio.create_task(self._read_stderr(), name=f"stderr of {name}")  # owned: ended in ``end``

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr(self) -> str:
        """The end of what it wrote to stderr so far."""
        return "\n".join(self._stderr)

    def send_line(self, text: str) -> None:
        """Writes a line to its stdin."""
        if self._process.stdin is not None:
            self._process.stdin.write(text.encode() + b"\n")

    async def line(self, timeout_s: float) -> str | None:
        """The next line of its stdout; None at its end. Raises DeadlineExceeded."""
        if self._process.stdout is None:
            return None
        try:
            async with asyncio.timeout(timeout_s):
                return (await self._process.stdout.readline()).decode(errors="replace") or None
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} said nothing for {timeout_s:.0f} s{self._quoted()}") from None

    async def event(self, timeout_s: float) -> dict[str, Any]:
        """The next line of its stdout as JSON. Raises LabError (it ended, or said something else), DeadlineExceeded."""
        line = await self.line(timeout_s)
        if line is None:
            code = await self._process.wait()
            await self._reader
            raise LabError(f"{self.name} ended early with exit code {code}{self._quoted()}")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise LabError(f"{self.name} printed {line[:80]!r} where a JSON object was expected{self._quoted()}")
        if isinstance(error := found.get("error"), dict):
            raise LabError(f"{self.name}: {error.get('message')}", hint=str(error.get("hint", "")))
        return found

    async def finished(self, timeout_s: float) -> Finished:
        """Closes its stdin and waits for its end. Raises DeadlineExceeded, and has killed it then."""
        out = b""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(timeout_s):
                if self._process.stdout is not None:
                    out = await self._process.stdout.read()
                code = await self._process.wait()
        except TimeoutError:
            self.kill()
            raise DeadlineExceeded(f"{self.name} has not ended within {timeout_s:.0f} s{self._quoted()}") from None
        await self._reader
        return Finished(code, out.decode(errors="replace"), self.stderr)

    async def end(self) -> None:
        """Closes its stdin and says SIGTERM; kills it where that does not help."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self.terminate()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        await self._reader

    def terminate(self) -> None:
        """SIGTERM: a node drains."""
        if self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    async def _read_stderr(self) -> None:
        if self._process.stderr is not None:
            async for line in self._process.stderr:
                self._stderr.append(line.decode(errors="replace").rstrip())

    def _quoted(self) -> str:
        return "; it said:\n  " + "\n  ".join(list(self._stderr)[-12:]) if self._stderr else ""

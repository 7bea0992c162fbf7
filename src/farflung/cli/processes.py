"""Processes of our own command, started and ended as one group (``farflung demo``).

Each child holds the reading end of a pipe as its stdin and ends when that closes (``--exit-with-stdin``). So children never
outlive their parent: not after an error, not after Ctrl-C, not after ``kill -9``. Children say that they are ready by a JSON
line on stdout; nobody sleeps and hopes.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from farflung.cli.config import DEFAULTS, OFF
from farflung.core.errors import DeadlineExceeded, StageFailed

STDERR_LINES = 12
"""Lines of a child's stderr that an error quotes."""

END_TIMEOUT_S = 8.0
"""From closing a child's stdin to killing it; more than the child's own grace."""

CREATE_NEW_PROCESS_GROUP = 0x200
"""Of Windows (``subprocess.CREATE_NEW_PROCESS_GROUP``, which only exists there)."""

MAX_LINE_BYTES = 16 * 1024**2
"""A line of JSON from a child: the longest is a generation of some hundred thousand token ids."""


class Child:
    """One running process. Made by ``Processes.start``."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._reader = asyncio.create_task(self._read_stderr(), name=f"stderr of {name}")  # owned: ended in ``end``

    @property
    def pid(self) -> int:
        return self._process.pid

    async def event(self, timeout_s: float) -> dict[str, Any]:
        """The next JSON line of its stdout. Raises StageFailed (it ended, with the end of its stderr), DeadlineExceeded."""
        stdout = self._process.stdout
        if stdout is None:
            raise StageFailed(f"{self.name} has no stdout to read from")
        try:
            async with asyncio.timeout(timeout_s):
                line = await stdout.readline()
                if not line:
                    code = await self._process.wait()
                    await self._reader
                    raise StageFailed(f"{self.name} ended early with exit code {code}{self._quoted()}")
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self.name} said nothing for {timeout_s:.0f} s{self._quoted()}", hint="a slower machine may need fewer nodes"
            ) from None
        found = json.loads(line)
        if not isinstance(found, dict):
            raise StageFailed(f"{self.name} printed {line[:80]!r} where a JSON object was expected")
        if "error" in found:
            raise StageFailed(f"{self.name}: {found['error']['message']}", hint=found["error"]["hint"])
        return found

    def send_line(self, text: str) -> None:
        """Writes a line to its stdin."""
        if self._process.stdin is not None:
            self._process.stdin.write(text.encode() + b"\n")

    async def end(self) -> None:
        """Closes its stdin, waits for it, kills it where that does not help."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reader

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    async def _read_stderr(self) -> None:
        if self._process.stderr is not None:
            async for line in self._process.stderr:
                self._stderr.append(line.decode(errors="replace").rstrip())

    def _quoted(self) -> str:
        return "; it said:\n  " + "\n  ".join(self._stderr) if self._stderr else ""


class Processes:
    """The children of one command."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    async def start(self, name: str, arguments: Sequence[str]) -> Child:
        """Starts ``python -m ARGUMENTS`` with pipes.

        It is in a group of its own, so that Ctrl-C reaches the parent alone, and takes no defaults from files or variables.
        """
        own_group: dict[str, Any] = (
            {"creationflags": CREATE_NEW_PROCESS_GROUP} if sys.platform == "win32" else {"start_new_session": True}
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            env={**os.environ, DEFAULTS: OFF},
            **own_group,
        )
        child = Child(name, process)
        self._children.append(child)
        return child

    async def end(self) -> None:
        """Ends all children, together."""
        try:
            await asyncio.gather(*(child.end() for child in self._children))
        finally:
            for child in self._children:
                child.kill()


@asynccontextmanager
async def processes() -> AsyncIterator[Processes]:
    """Children that have all ended when the block has."""
    group = Processes()
    try:
        yield group
    finally:
        await group.end()

"""A conversation through a real pseudo-terminal: editing, the live line, and Ctrl-C at an answer and at the prompt."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_lines import TIMEOUT_S, HandmadeSwarm

CTRL_C = "\x03"

TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, '-m', 'farflung', *sys.argv[1:]])"
)
"""Makes stdin the controlling terminal, so that Ctrl-C there becomes SIGINT, and goes on as farflung."""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")


class Terminal:
    """``farflung ARGUMENTS`` with a terminal for stdin, stdout and stderr."""

    def __init__(self, *arguments: object) -> None:
        import pty

        self._end, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *(str(argument) for argument in arguments)],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        )
        os.close(inner)
        self.shown = ""

    def wait_for(self, pattern: str) -> None:
        """Reads until ``pattern`` shows; what was read is forgotten up to its end."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self._end], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{pattern!r} did not show; there is {self.shown!r}"
            self.shown += os.read(self._end, 65536).decode(errors="replace")
        self.shown = self.shown[found.end() :]

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def interrupt_until_it_ends(self) -> int:
        """Presses Ctrl-C as a person does. Between printing its prompt and waiting for keys, readline loses a signal."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self.type(CTRL_C)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5.0)
        return self.end()

    def end(self) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout=TIMEOUT_S)
        finally:
            self.process.kill()
            os.close(self._end)


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(swarm: HandmadeSwarm, model: Path) -> None:
    terminal = Terminal("chat", "-d", swarm.url, "-m", model, "--max-tokens", 200)
    terminal.wait_for("> ")
    terminal.type("The dog\n")
    terminal.wait_for(r"\d+ tokens · [\d.]+ tokens/s")
    terminal.type(CTRL_C)
    terminal.wait_for(r"\(stopped\)")
    terminal.wait_for("> ")
    terminal.type("/reset\n")
    terminal.wait_for("forgotten")
    terminal.wait_for("> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt_leaves_with_130(swarm: HandmadeSwarm, model: Path) -> None:
    terminal = Terminal("chat", "-d", swarm.url, "-m", model)
    terminal.wait_for("> ")
    assert terminal.interrupt_until_it_ends() == 130


def test_an_error_of_one_answer_does_not_end_the_conversation(swarm: HandmadeSwarm, model: Path) -> None:
    terminal = Terminal("chat", "-d", swarm.url, "-m", model, "--max-tokens", 300)
    terminal.wait_for("> ")
    terminal.type("The dog\n")
    terminal.wait_for("error: ")
    terminal.wait_for("hint: ")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_generate_in_a_terminal_streams_with_a_live_line_and_ends_with_the_summary(swarm: HandmadeSwarm, model: Path) -> None:
    terminal = Terminal("generate", "-d", swarm.url, "-m", model, "--max-tokens", 20, "The dog")
    terminal.wait_for("The dog")
    terminal.wait_for(r"\d+ tokens · [\d.]+ tokens/s · first after")
    terminal.wait_for("links and waiting")
    terminal.wait_for("tokens after a prompt of")
    assert terminal.end() == 0

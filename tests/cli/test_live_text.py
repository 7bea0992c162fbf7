"""Streaming into a terminal: whatever comes, the text stands there whole and the status line leaves no trace."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.cli.live import LiveText

WIDTH = 20


class Screen:
    """As much of a terminal as the stream uses: printing with wrap, newline, return, cursor up and right, erase below."""

    def __init__(self) -> None:
        self.lines = [[" "] * WIDTH]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|.", text, re.DOTALL):
            if part == "\n":
                self.row, self.column = self.row + 1, 0
            elif part == "\r":
                self.column = 0
            elif part == "\x1b[J":
                self.lines[self.row][self.column :] = [" "] * (WIDTH - self.column)
                del self.lines[self.row + 1 :]
            elif part == "\x1b[1A":
                self.row -= 1
            elif re.fullmatch(r"\x1b\[\d+C", part):
                self.column += int(part[2:-1])
            elif not part.endswith("m"):
                if self.column == WIDTH:
                    self.row, self.column = self.row + 1, 0
                self._grow()
                self.lines[self.row][self.column] = part
                self.column += 1
            self._grow()

    def _grow(self) -> None:
        while len(self.lines) <= self.row:
            self.lines.append([" "] * WIDTH)

    @property
    def shown(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]


def wrapped(text: str) -> list[str]:
    return [line[i : i + WIDTH].rstrip() for line in text.split("\n") for i in range(0, max(len(line), 1), WIDTH)]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))


@given(pieces=st.lists(st.text("ab \n", max_size=30), max_size=12))
def test_the_text_stands_whole_and_the_status_is_gone(pieces: list[str]) -> None:
    written: list[str] = []
    live = LiveText(written.append, lambda: None)
    for piece in pieces:
        live.write(piece, "12 tokens, a status longer than the line is wide")
    live.close()
    screen = Screen()
    screen.feed("".join(written))
    shown = [line for line in screen.shown if line]
    assert shown == [line for line in wrapped("".join(pieces)) if line]


def test_the_status_stands_below_the_text_while_it_streams() -> None:
    written: list[str] = []
    live = LiveText(written.append, lambda: None)
    live.write("one two", "1 token")
    live.write(" three", "2 tokens")
    screen = Screen()
    screen.feed("".join(written))
    assert screen.shown == ["one two three", "2 tokens"]
    assert (screen.row, screen.column) == (0, len("one two three"))


def test_escape_sequences_of_a_model_do_not_reach_the_terminal() -> None:
    written: list[str] = []
    live = LiveText(written.append, lambda: None)
    live.write("\x1b]0;title\x07red", "")
    assert "\x1b]" not in "".join(written)

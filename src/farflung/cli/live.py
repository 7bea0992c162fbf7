"""Text that streams into a terminal with one line of figures below it."""

from __future__ import annotations

import shutil
from collections.abc import Callable

CLEAR_BELOW = "\x1b[J"
UP = "\x1b[1A"


class LiveText:
    """Streams text; keeps a status on the line under it.

    The status is erased before more text comes, and the cursor goes back to where the text ended. That place is computed from
    the width of the text; a tab is shown as spaces, other control characters are left out.

    Args:
        out: takes what is written.
        flush: makes it appear.
    """

    def __init__(self, out: Callable[[str], object], flush: Callable[[], object]) -> None:
        self._out = out
        self._flush = flush
        self._column = 0
        self._status_shown = False

    def write(self, text: str, status: str) -> None:
        from rich.cells import cell_len

        width = max(shutil.get_terminal_size().columns, 20)
        self._erase()
        for piece in text.replace("\t", "    ").splitlines(keepends=True):
            shown = "".join(c for c in piece if c.isprintable())
            self._out(shown)
            self._column += cell_len(shown)
            if self._column >= width and self._column % width == 0:
                self._out("\n")  # a full line would leave the cursor hanging at its edge
                self._column = 0
            self._column %= width
            if piece.endswith(("\n", "\r")):
                self._out("\n")
                self._column = 0
        line = status[: width - 1]
        right = f"\x1b[{self._column}C" if self._column else ""
        self._out(f"\n{line}{UP}\r{right}")
        self._status_shown = True
        self._flush()

    def close(self) -> None:
        """Erases the status and ends the line."""
        self._erase()
        self._out("\n" if self._column else "")
        self._flush()

    def _erase(self) -> None:
        if self._status_shown:
            self._out(CLEAR_BELOW)
            self._status_shown = False

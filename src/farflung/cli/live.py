"""Text that streams into a terminal with one line of figures below it."""

from __future__ import annotations

import shutil
import sys

CLEAR_BELOW = "\x1b[J"
UP = "\x1b[1A"


class LiveText:
    """Streams text; keeps a status on the line under it.

    The status is erased before more text comes, and the cursor goes back to where the text ended. That place is computed from
    the width of the text, so tabs and other control characters are shown as spaces.
    """

    def __init__(self) -> None:
        self._column = 0
        self._status_shown = False

    def write(self, text: str, status: str) -> None:
        from rich.cells import cell_len

        width = max(shutil.get_terminal_size().columns, 20)
        self._erase()
        for piece in text.replace("\t", "    ").splitlines(keepends=True):
            shown = "".join(c for c in piece if c.isprintable())
            sys.stdout.write(shown)
            self._column += cell_len(shown)
            if self._column >= width and self._column % width == 0:
                sys.stdout.write("\n")  # a full line would leave the cursor hanging at its edge
                self._column = 0
            self._column %= width
            if piece.endswith(("\n", "\r")):
                sys.stdout.write("\n")
                self._column = 0
        line = status[: width - 1]
        right = f"\x1b[{self._column}C" if self._column else ""
        sys.stdout.write(f"\n\x1b[2m{line}\x1b[0m{UP}\r{right}")
        self._status_shown = True
        sys.stdout.flush()

    def close(self) -> None:
        """Erases the status and ends the line."""
        self._erase()
        sys.stdout.write("\n" if self._column else "")
        sys.stdout.flush()

    def _erase(self) -> None:
        if self._status_shown:
            sys.stdout.write(CLEAR_BELOW)
            self._status_shown = False

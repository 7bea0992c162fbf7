"""A file of pages of equal size: the disk part of the row logs of all sessions of a node.

A cache, not a store: nothing outlives the process. The file has a random name in a folder of the node's own, is readable by its
user alone, and loses its name as soon as it is open where the system allows that; elsewhere it is removed when closed, and
``PageFile`` sweeps away what a crash left. Pages freed are used again, so the file is never larger than its budget whatever
sessions come and go. Reads and writes are plain system calls into the page cache and are never synced.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from blake3 import blake3

from farflung.core.errors import ConfigError, LogEvicted

_PREFIX, _SUFFIX = "rows-", ".spill"


@dataclass(frozen=True, slots=True)
class Page:
    """A page in use: its place in the file, and the length and BLAKE3 hash of what was written there."""

    number: int
    length: int
    hash: bytes


class PageFile:
    """At most ``pages`` pages of ``page_bytes``, in a file under ``directory`` that is made at the first write.

    The folder must not be used for anything else. Raises ConfigError where it cannot be made or listed.
    """

    def __init__(self, directory: Path, page_bytes: int, pages: int) -> None:
        self.page_bytes = page_bytes
        self.pages_used = 0
        self._directory = directory
        self._pages = pages
        self._free: list[int] = []
        self._next = 0
        self._file: FileIO | None = None
        self._path: Path | None = None
        self._last_read: tuple[Page, bytes] | None = None
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in directory.glob(f"{_PREFIX}*{_SUFFIX}"):
                with contextlib.suppress(OSError):  # where a named file is open elsewhere, its owner removes it
                    left.unlink()
        except OSError as error:
            raise ConfigError(
                f"cannot keep row logs in {directory}: {error}", hint="choose another folder, or no disk for logs"
            ) from error

    @property
    def is_full(self) -> bool:
        return self.pages_used >= self._pages

    def write(self, content: bytes) -> Page:
        """Puts ``content``, at most a page long, on a free page; there must be one. Raises OSError where the disk refuses."""
        number = self._free[-1] if self._free else self._next
        file = self._opened()
        file.seek(number * self.page_bytes)
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
        if self._free:
            self._free.pop()
        else:
            self._next += 1
        self.pages_used += 1
        return Page(number, len(content), blake3(content).digest())

    def read(self, page: Page) -> bytes:
        """What was written there. The last page read is kept, for rows are asked for one after the other.

        Raises LogEvicted where the disk does not give back what was written.
        """
        if self._last_read is not None and self._last_read[0] is page:
            return self._last_read[1]
        try:
            content = self._read(page)
        except OSError as error:
            raise LogEvicted(f"page {page.number} of the row log in {self._directory} cannot be read: {error}") from error
        if len(content) != page.length:
            raise LogEvicted(
                f"page {page.number} of the row log in {self._directory} has {len(content)} bytes, {page.length} were written"
            )
        if blake3(content).digest() != page.hash:
            raise LogEvicted(
                f"page {page.number} of the row log in {self._directory} is not what was written: its hash differs"
            )
        self._last_read = (page, content)
        return content

    def free(self, page: Page) -> None:
        """Its place may be used again; with the last page the whole file is given back to the disk."""
        if self._last_read is not None and self._last_read[0] is page:
            self._last_read = None
        self.pages_used -= 1
        self._free.append(page.number)
        if self.pages_used == 0:
            self._free.clear()
            self._next = 0
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.truncate(0)

    def close(self) -> None:
        """Removes the file. May be called more than once."""
        self._last_read = None
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._path = None

    def _read(self, page: Page) -> bytes:
        file = self._opened()
        file.seek(page.number * self.page_bytes)
        parts: list[bytes] = []
        wanted = page.length
        while wanted > 0 and (part := file.read(wanted)):
            parts.append(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _opened(self) -> FileIO:
        if self._file is None:
            descriptor, name = tempfile.mkstemp(_SUFFIX, _PREFIX, self._directory)
            self._file = FileIO(descriptor, "r+")
            try:
                os.unlink(name)
            except OSError:  # Windows keeps the name of an open file
                self._path = Path(name)
        return self._file

"""How much of what the stages of a node sent it keeps, and where (rule 6: memory, then disk, then eviction, announced).

One ``LogBudget`` serves the logs of all sessions. Over its memory the oldest committed rows of the largest session move to
disk, over its disk they are given up, and whoever opened that log is told from which position on it is still complete. Rows
that are not committed are never given up: they are few (``MAX_ALIVE_SLOTS``) and the only copy of what is being decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from farflung.core.errors import LogEvicted
from farflung.core.ids import SessionId
from farflung.node.page_file import Page, PageFile
from farflung.node.row_log import OnEvicted, RowLog


@dataclass(frozen=True)
class LogConfig:
    """Attributes:
    memory_bytes: for rows in memory, of all sessions together; only rows that are not committed may exceed it.
    disk_bytes: the largest the file may grow; 0 for no disk.
    directory: a folder for nothing else; None for no disk.
    page_bytes: what moves to disk at once. Joining, hashing and writing a page takes 0.1-0.4 ms, for which the event loop
        waits (``bench.row_log``). A row larger than a page is never on disk.
    """

    memory_bytes: int = 256 << 20
    disk_bytes: int = 4 << 30
    directory: Path | None = None
    page_bytes: int = 128 << 10


class LogBudget:
    """Memory and disk for the row logs of a node. ``close`` it with the node.

    Raises ConfigError where the folder cannot be used. A disk that fails later costs rows, not the node: see ``disk_error``.
    """

    def __init__(self, config: LogConfig) -> None:
        self.config = config
        self.memory_used = 0
        self.disk_error = ""
        self._logs: dict[RowLog, None] = {}
        pages = config.disk_bytes // config.page_bytes
        self._file = PageFile(config.directory, config.page_bytes, pages) if config.directory and pages else None

    @property
    def disk_used(self) -> int:
        """Bytes, in whole pages."""
        return self._file.pages_used * self.config.page_bytes if self._file else 0

    def open(self, session: SessionId, on_evicted: OnEvicted) -> RowLog:
        """A new log, which its session closes."""
        log = RowLog(self, session, on_evicted)
        self._logs[log] = None
        return log

    def close(self) -> None:
        """Closes every log and removes the file."""
        for log in tuple(self._logs):
            log.close()
        if self._file is not None:
            self._file.close()

    # -- for RowLog --------------------------------------------------------------------------------------------------

    @property
    def page_bytes(self) -> int:
        return self.config.page_bytes

    def grew(self, size: int) -> None:
        self.memory_used += size

    def fit(self) -> None:
        """Moves or gives up committed rows until memory is within the budget, or only uncommitted rows are left in it."""
        evicted: dict[RowLog, None] = {}
        while self.memory_used > self.config.memory_bytes:
            largest = max((log for log in self._logs if log.has_spillable), key=_memory, default=None)
            if largest is None:
                break
            if not self._spill(largest, evicted):
                largest.evict_oldest()
                evicted[largest] = None
        for log in evicted:
            log.on_evicted(log.session, log.complete_from)

    def read(self, page: Page) -> bytes:
        if self._file is None:
            raise LogEvicted("the node keeps no rows on disk")
        return self._file.read(page)

    def free(self, page: Page) -> None:
        if self._file is not None:
            self._file.free(page)

    def forget(self, log: RowLog) -> None:
        self._logs.pop(log, None)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _spill(self, log: RowLog, evicted: dict[RowLog, None]) -> bool:
        """Moves the oldest rows in memory to a page. False where there is no disk, or it refuses."""
        file = self._file
        slots = log.oldest_in_memory(self.page_bytes)
        if file is None or not slots:
            return False
        if file.is_full:
            fullest = max(self._logs, key=_pages)
            fullest.evict_oldest()
            evicted[fullest] = None
        try:
            page = file.write(log.payload(slots))
        except OSError as error:
            self.disk_error = str(error)
            return False
        log.moved(slots, page)
        return True


def _memory(log: RowLog) -> int:
    return log.memory


def _pages(log: RowLog) -> int:
    return len(log.pages)

"""How a serving process is told to end: a signal, or the end of the process that started it.

The first request lets the command end in order (drain, withdraw, close); a second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from queue import SimpleQueue

from farflung.cli.output import INTERRUPTED

ORPHAN_GRACE_S = 5.0
"""Time an orphaned process has to end in order."""


class ParentWatch:
    """Ends this process when its stdin closes: whoever started it held the other end and is gone, however it went.

    A daemon thread reads from the start of the process on, so it works while weights load too. Until ``on_gone`` is set there
    is nothing to end in order and the process exits at once; afterwards it has ``ORPHAN_GRACE_S``. Lines that come before go to
    ``lines``.
    """

    def __init__(self) -> None:
        self.on_gone: Callable[[], object] | None = None
        self.lines: SimpleQueue[bytes] = SimpleQueue()
        threading.Thread(target=self._watch, name="parent-watch", daemon=True).start()

    def _watch(self) -> None:
        partial = b""
        while data := os.read(sys.stdin.fileno(), 65536):
            *lines, partial = (partial + data).split(b"\n")
            for line in lines:
                self.lines.put(line)
        if self.on_gone is not None:
            self.on_gone()
            threading.Event().wait(ORPHAN_GRACE_S)
        os._exit(1)


class StopRequest:
    """Set once, by the first reason to stop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.interrupted = False

    async def wait(self) -> None:
        await self._event.wait()

    def parent_gone(self) -> None:
        self._event.set()

    def signalled(self, number: int) -> None:
        if number == signal.SIGINT and self.interrupted:
            os._exit(INTERRUPTED)
        self.interrupted = self.interrupted or number == signal.SIGINT
        self._event.set()


@contextmanager
def stop_requests(watch: ParentWatch | None) -> Iterator[StopRequest]:
    """A request that SIGINT, SIGTERM (on Windows: Ctrl-C and Ctrl-Break) and ``watch`` fulfil while the block runs.

    Raises KeyboardInterrupt at its end where Ctrl-C was the reason, so that the exit code says so.
    """
    loop = asyncio.get_running_loop()
    stop = StopRequest()
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        _on_signal(loop, number, stop.signalled)
    if watch is not None:
        watch.on_gone = lambda: loop.call_soon_threadsafe(stop.parent_gone)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, before[number])
    if stop.interrupted:
        raise KeyboardInterrupt


@contextmanager
def on_hangup(then: Callable[[], object] | None) -> Iterator[None]:
    """Calls ``then`` for each SIGHUP while the block runs; without it, and on Windows, SIGHUP is left as it is."""
    if then is None or not hasattr(signal, "SIGHUP"):
        yield
        return
    call, before = then, signal.getsignal(signal.SIGHUP)
    _on_signal(asyncio.get_running_loop(), signal.SIGHUP, lambda _number: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _on_signal(loop: asyncio.AbstractEventLoop, number: int, then: Callable[[int], object]) -> None:
    try:
        loop.add_signal_handler(number, then, number)
    except NotImplementedError:  # Windows: there a plain handler wakes the loop through its wakeup socket
        signal.signal(number, lambda received, _frame: loop.call_soon_threadsafe(then, received))


async def first_of(*waits: Awaitable[object]) -> None:
    """Ends when the first of ``waits`` ends, raising what it raised; the others are cancelled and awaited."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def cancelled_by_sigterm() -> AsyncIterator[None]:
    """SIGTERM cancels the running task while the block runs, so that a command cleans up as after Ctrl-C."""
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    if task is None or not hasattr(signal, "SIGTERM"):
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    _on_signal(loop, signal.SIGTERM, lambda _number: _cancel(task))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cancel(task: asyncio.Task[object]) -> None:
    task.cancel()

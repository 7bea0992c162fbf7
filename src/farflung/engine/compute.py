"""Where the work of a step is done: on one thread beside the event loop, or on the loop itself.

Torch needs one thread to call it from, the loop must not wait for it. ``ComputeThread`` hands over through a C queue and one
``call_soon_threadsafe``: 32 us there and back, an executor 39 to 54. ``InlineCompute`` is for virtual clocks, on which a thread
would race the clock.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from farflung.core.errors import ProtocolViolation

T = TypeVar("T")


class Compute(Protocol):
    """Runs one function at a time."""

    def clock(self) -> float:
        """Seconds, for measuring what a function took; called within it."""

    async def run(self, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises. Cancelling takes effect when it has ended: work is never abandoned half done."""

    async def aclose(self) -> None:
        """Waits for what runs, then frees the thread. Calling it again, or by several at a time, is fine."""


class InlineCompute:
    """On the event loop, which stands still meanwhile: on a virtual clock work takes no time."""

    def clock(self) -> float:
        return asyncio.get_running_loop().time()

    async def run(self, work: Callable[[], T]) -> T:
        return work()

    async def aclose(self) -> None:
        return


class ComputeThread:
    """On a thread of its own."""

    def __init__(self, name: str, setup: Callable[[], None] | None = None) -> None:
        """``setup`` runs first, on the thread: settings that hold per thread, such as its number of OpenMP workers."""
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._setup = setup
        self._ended: asyncio.Future[None] | None = None
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def clock(self) -> float:
        return time.perf_counter()

    async def run(self, work: Callable[[], T]) -> T:
        if self._ended is not None:
            raise ProtocolViolation("work was handed to a compute thread that is closed")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def call() -> None:
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - carried to whoever awaits
                loop.call_soon_threadsafe(done.set_exception, error)
            else:
                loop.call_soon_threadsafe(done.set_result, result)

        self._queue.put(call)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            await _outlast(done)
            raise

    async def aclose(self) -> None:
        if self._ended is None:
            loop = asyncio.get_running_loop()
            ended = self._ended = loop.create_future()

            def last() -> None:
                loop.call_soon_threadsafe(ended.set_result, None)

            self._queue.put(last)
            self._queue.put(None)
        await asyncio.shield(self._ended)  # shared by all who close: one who gives up takes it from nobody
        self._thread.join()

    def _serve(self) -> None:
        if self._setup is not None:
            self._setup()
        while (call := self._queue.get()) is not None:
            call()


async def _outlast(done: asyncio.Future[Any]) -> None:
    """Waits until ``done`` is done, however often the waiting task is cancelled; its result is nobody's."""
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            continue
    if not done.cancelled():
        done.exception()

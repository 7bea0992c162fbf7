"""An event loop in a thread of its own, for callers without one: scripts, notebooks, a terminal that waits for its reader."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

_T = TypeVar("_T")

UNWIND_TIMEOUT_S = 10.0
"""How long an interrupted call may take to end in good order."""

_WAIT_S = 0.2  # on Windows only a wait that ends lets Ctrl-C in


class LoopThread:
    """Runs for the length of a ``with``."""

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="farflung-loop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """The coroutine's result. An interruption (Ctrl-C) cancels it, waits until it has cleaned up, and is raised then."""
        ended = threading.Event()

        async def whole() -> _T:
            try:
                return await coroutine
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(whole(), self._loop)
        try:
            while True:
                try:
                    return future.result(timeout=_WAIT_S)
                except TimeoutError:
                    if future.done():
                        raise  # it was the coroutine's own
        except BaseException:
            if future.cancel():
                ended.wait(UNWIND_TIMEOUT_S)
            raise

    @contextmanager
    def holding(self, context: AbstractAsyncContextManager[_T]) -> Iterator[_T]:
        """Enters an asynchronous context there, and leaves it when the block ends."""
        holder = _Holder(context)
        try:
            yield self.run(holder.enter())
        finally:
            self.run(holder.leave())


class _Holder(Generic[_T]):
    """Holds a context open in one task, because what a task enters that task must leave."""

    def __init__(self, context: AbstractAsyncContextManager[_T]) -> None:
        self._context = context
        self._task: asyncio.Task[None] | None = None
        self._leave = asyncio.Event()
        self._entered = False

    async def enter(self) -> _T:
        entered: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(entered), name="context of another thread")
        waits: set[asyncio.Future[Any]] = {entered, self._task}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not entered.done():
            self._task.result()  # raises why
        return entered.result()

    async def leave(self) -> None:
        if self._task is not None:
            if not self._entered:
                self._task.cancel()  # interrupted while it still went in
            self._leave.set()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _hold(self, entered: asyncio.Future[_T]) -> None:
        async with self._context as value:
            self._entered = True
            entered.set_result(value)
            await self._leave.wait()

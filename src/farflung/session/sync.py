"""The driver without ``async``, for scripts and notebooks: the event loop runs in a thread of its own.

with connect("http://127.0.0.1:7700", "gemma3-270m") as swarm:
    for token in swarm.generate("The sea is"):
        print(token.text, end="")
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from typing import Any, TypeVar

from farflung.identity.keys import Identity
from farflung.session.generation import Generation, Token
from farflung.session.options import GenerateOptions
from farflung.session.stats import GenerationStats
from farflung.session.swarm import Swarm

_T = TypeVar("_T")

UNWIND_TIMEOUT_S = 10.0
"""How long an interrupted call may take to end in good order."""


class _LoopThread:
    """An event loop in a daemon thread; ``run`` waits for a coroutine there, and cancels it when the wait is interrupted."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._running: set[asyncio.Task[Any] | None] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="farflung-loop", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(self._tracked(coroutine), self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():  # interrupted: the coroutine must have ended before anything else is asked of it
                asyncio.run_coroutine_threadsafe(self._until_idle(), self._loop).result(timeout=UNWIND_TIMEOUT_S)
            raise

    async def _tracked(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        task = asyncio.current_task()
        self._running.add(task)
        try:
            return await coroutine
        finally:
            self._running.discard(task)

    async def _until_idle(self) -> None:
        if running := [task for task in self._running if task is not None]:
            await asyncio.wait(running)

    def close(self) -> None:
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class SyncGeneration:
    """Iterate over it once. Leaving the loop early cancels the generation at every stage."""

    def __init__(self, generation: Generation, thread: _LoopThread) -> None:
        self._generation = generation
        self._thread = thread

    @property
    def stats(self) -> GenerationStats:
        return self._generation.stats

    @property
    def finish_reason(self) -> str | None:
        return self._generation.finish_reason

    def __iter__(self) -> Iterator[Token]:
        tokens = self._generation.__aiter__()
        try:
            while True:
                try:
                    yield self._thread.run(tokens.__anext__())
                except StopAsyncIteration:
                    return
        finally:
            self._thread.run(tokens.aclose())

    def text(self) -> str:
        """Runs to the end and returns the whole text."""
        for _ in self:
            pass
        return self.stats.text


class SyncSwarm:
    """What ``connect`` gives."""

    def __init__(self, swarm: Swarm, thread: _LoopThread) -> None:
        self._swarm = swarm
        self._thread = thread

    def generate(self, prompt: str | Sequence[int], options: GenerateOptions | None = None) -> SyncGeneration:
        """See ``Swarm.generate``."""
        return SyncGeneration(self._swarm.generate(prompt, options), self._thread)

    def chat(self, messages: Sequence[Mapping[str, str]], options: GenerateOptions | None = None) -> SyncGeneration:
        """See ``Swarm.chat``."""
        return SyncGeneration(self._swarm.chat(messages, options), self._thread)


@contextmanager
def connect(directory_url: str, model: str, *, identity: Identity | None = None) -> Iterator[SyncSwarm]:
    """See ``Swarm.connect``."""
    thread = _LoopThread()
    stack = AsyncExitStack()
    try:
        swarm = thread.run(stack.enter_async_context(Swarm.connect(directory_url, model, identity=identity)))
        yield SyncSwarm(swarm, thread)
    finally:
        thread.run(stack.aclose())
        thread.close()

"""The one owner of what goes on beside everything else: a roster's following, an announcer's renewing."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Background(ABC):
    """Work that goes on in a task of its own from entry to exit of an ``async with``.

    It is not meant to end before. Where it does it has failed: ``ended`` raises why, and so does leaving the block, unless that
    is left for another error.

    Args:
        name: of the task.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=self._name)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait({self._task})
        failure = None if self._task.cancelled() else self._task.exception()
        if failure is not None and error is None:
            raise failure

    @property
    def has_ended(self) -> bool:
        """Whether the work is over, one way or the other."""
        return self._task is not None and self._task.done()

    async def ended(self) -> None:
        """Waits until the work is over: returns where the block was left, raises what it failed with."""
        if self._task is None:
            return
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.result()

    @abstractmethod
    async def _run(self) -> None:
        """The work."""

"""The driver without ``async``, for scripts and notebooks: the event loop runs in a thread of its own.

with connect("http://127.0.0.1:7700", "gemma3-270m") as swarm:
    for token in swarm.generate("The sea is"):
        print(token.text, end="")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from farflung.identity.keys import Identity
from farflung.identity.swarm_key import SwarmKey
from farflung.session.generation import Generation, Token
from farflung.session.loop_thread import LoopThread
from farflung.session.options import GenerateOptions
from farflung.session.stats import GenerationStats
from farflung.session.swarm import Swarm


class SyncGeneration:
    """Iterate over it once. Leaving the loop early cancels the generation at every stage."""

    def __init__(self, generation: Generation, thread: LoopThread) -> None:
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

    def __init__(self, swarm: Swarm, thread: LoopThread) -> None:
        self._swarm = swarm
        self._thread = thread

    def generate(self, prompt: str | Sequence[int], options: GenerateOptions | None = None) -> SyncGeneration:
        """See ``Swarm.generate``."""
        return SyncGeneration(self._swarm.generate(prompt, options), self._thread)

    def chat(self, messages: Sequence[Mapping[str, str]], options: GenerateOptions | None = None) -> SyncGeneration:
        """See ``Swarm.chat``."""
        return SyncGeneration(self._swarm.chat(messages, options), self._thread)


@contextmanager
def connect(
    directory_url: str, model: str, *, identity: Identity | None = None, swarm_key: SwarmKey | None = None
) -> Iterator[SyncSwarm]:
    """See ``Swarm.connect``."""
    with (
        LoopThread() as thread,
        thread.holding(Swarm.connect(directory_url, model, identity=identity, swarm_key=swarm_key)) as swarm,
    ):
        yield SyncSwarm(swarm, thread)

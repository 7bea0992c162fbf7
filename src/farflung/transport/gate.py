"""Which accepted connections are let in, before anything is spent on them. Pure: the time is passed in.

Strangers are told apart by source (``rates.source_of``). Where too many connections have not finished their handshake, the
source that has most of them loses its oldest: an honest peer is through in a few round trips, and one that only holds on
becomes the oldest.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from farflung.core.errors import LinkOverloaded
from farflung.transport.rates import Rates

C = TypeVar("C", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What one listener takes.

    Attributes:
        connections: open at a time, links included; below the usual 1,024 file descriptors of a process.
        connections_per_source: of them, of one source. Many drivers may share an address behind a router.
        greetings: connections that have not finished their handshake; 45 KB of TLS state each, once they have begun it.
        greetings_per_source: of them, of one source.
        burst: connections of one source at once, after a pause.
        per_s: connections of one source per second, for long. Links are kept, so honest peers need few; a handshake costs the
            listener 0.8 ms.
    """

    connections: int = 896
    connections_per_source: int = 128
    greetings: int = 256
    greetings_per_source: int = 64
    burst: int = 128
    per_s: float = 4.0


class Gate(Generic[C]):
    """Counts the connections of one listener, from ``enter`` to ``left``."""

    def __init__(self, config: GateConfig) -> None:
        self._config = config
        self._sources: dict[C, str] = {}
        self._held: dict[str, int] = {}
        self._greeting: dict[str, dict[C, None]] = {}
        self._greetings = 0
        self._rates = Rates(config.burst, config.per_s)

    @property
    def connections(self) -> int:
        return len(self._sources)

    @property
    def greetings(self) -> int:
        return self._greetings

    def enter(self, connection: C, source: str, now: float) -> C | None:
        """Lets a connection in, which begins its handshake. Returns the one that must be dropped for it, if any.

        Raises LinkOverloaded, where it must not be let in.
        """
        config, held = self._config, self._held.get(source, 0)
        if not self._rates.take(source, now):
            raise LinkOverloaded(f"{source} connects more than {config.per_s:g} times a second")
        if held >= config.connections_per_source:
            raise LinkOverloaded(f"{source} has {held} connections open, the limit for one address")
        if len(self._sources) >= config.connections:
            raise LinkOverloaded(f"{len(self._sources)} connections are open, the limit")
        dropped = self._surplus(source)
        if dropped is not None:
            self.greeted(dropped)
        self._sources[connection] = source
        self._held[source] = held + 1
        self._greeting.setdefault(source, {})[connection] = None
        self._greetings += 1
        return dropped

    def greeted(self, connection: C) -> None:
        """Its handshake is over, well or not."""
        source = self._sources.get(connection, "")
        of_source = self._greeting.get(source, {})
        if connection in of_source:
            del of_source[connection]
            self._greetings -= 1
            if not of_source:
                del self._greeting[source]

    def left(self, connection: C) -> None:
        """Its socket is closed. One that was not let in is not known here."""
        self.greeted(connection)
        source = self._sources.pop(connection, None)
        if source is not None:
            self._held[source] -= 1
            if not self._held[source]:
                del self._held[source]

    def _surplus(self, source: str) -> C | None:
        """The oldest unfinished connection of the source that has too many, or of the one that has most where all do."""
        of_source = self._greeting.get(source, {})
        if len(of_source) >= self._config.greetings_per_source:
            return next(iter(of_source))
        if self._greetings >= self._config.greetings:
            most = max(self._greeting, key=lambda name: len(self._greeting[name]))
            return next(iter(self._greeting[most]))
        return None

"""How long to wait before the next try: doubling, with jitter, so that a thousand nodes do not come back at once."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class BackoffConfig:
    """First and longest wait, seconds; each is drawn between half of it and the whole."""

    first_s: float = 0.5
    longest_s: float = 10.0


class Backoff:
    """Waits of one who tries again. ``random`` is passed in, so that a simulation repeats itself."""

    def __init__(self, config: BackoffConfig, random: Random) -> None:
        self._config = config
        self._random = random
        self._tries = 0

    def next_s(self) -> float:
        """The wait after one more failure."""
        whole = min(self._config.longest_s, self._config.first_s * 2.0 ** min(self._tries, 30))
        self._tries += 1
        return whole * self._random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """After a success."""
        self._tries = 0

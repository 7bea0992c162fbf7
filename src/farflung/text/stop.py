"""Stop strings in streamed text.

The text ends where a stop string is first *complete* (of several complete at one place, the longest), and is given out up to
where that one begins. So generation ends with the first possible token, and the outcome does not depend on how the text was cut
into chunks. Text that could be the beginning of a stop string is held back until it is decided.
"""

from __future__ import annotations

from dataclasses import dataclass

from farflung.core.errors import UsageError

_MOST = 16


@dataclass(frozen=True)
class StopResult:
    """Text to give out now, and the stop string that ended the text, if one has."""

    text_to_emit: str
    stopped: str | None = None


class StopStrings:
    """Watches one text. Raises UsageError for an empty stop string and for more than 16."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        if len(stops) > _MOST:
            raise UsageError(f"{len(stops)} stop strings are too many", hint=f"at most {_MOST}")
        if "" in stops:
            raise UsageError("a stop string is empty", hint="leave it out: an empty one would end every text before it begins")
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self._stopped: str | None = None

    def push(self, text: str) -> StopResult:
        """Takes the next piece of text. After the end it gives out nothing more."""
        if self._stopped is not None:
            return StopResult("", self._stopped)
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, _, self._stopped = min(found)
            self._held = ""
            return StopResult(text[: end - len(self._stopped)], self._stopped)
        certain = len(text) - self._undecided(text)
        self._held = text[certain:]
        return StopResult(text[:certain])

    def finish(self) -> StopResult:
        """The text is over: gives out what was held back."""
        held, self._held = self._held, ""
        return StopResult(held, self._stopped)

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

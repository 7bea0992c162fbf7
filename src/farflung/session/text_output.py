"""From token ids to the text a caller sees: incremental detokenising, cut at the first stop string."""

from __future__ import annotations

from farflung.text.detokenize import Detokenizer
from farflung.text.stop import StopStrings


class TextOutput:
    """The text of one generation.

    Args:
        detokenizer: None gives tokens without text.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, detokenizer: Detokenizer | None, stop: StopStrings | None) -> None:
        self._detokenizer = detokenizer
        self._stop = stop

    def push(self, token: int) -> tuple[str, bool]:
        """The text that became certain with this token, and whether a stop string ended it."""
        text = self._detokenizer.push(token) if self._detokenizer is not None else ""
        if self._stop is None:
            return text, False
        result = self._stop.push(text)
        return result.text_to_emit, result.stopped is not None

    def finish(self) -> str:
        """What was held back."""
        text = self._detokenizer.finish() if self._detokenizer is not None else ""
        if self._stop is None:
            return text
        return self._stop.push(text).text_to_emit + self._stop.finish().text_to_emit

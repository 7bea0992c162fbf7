"""Token ids to text, one token at a time, giving text out as soon as no later token can change it.

Invariant: what ``push`` and ``finish`` return, joined, is ``decode`` of all ids. Characters may span tokens (bytes of UTF-8),
and a decoder looks at neighbours (SentencePiece drops the leading space of a text), so tokens cannot be decoded singly. The
technique is that of text-generation-inference and vLLM: decode a short window that begins with tokens whose text is already
out, and give out what it has more than before. What can still change is held back:

- an incomplete UTF-8 sequence: it decodes to U+FFFD, exactly one, at the end of the text;
- a run of byte-fallback tokens: one bad byte turns all of the run into U+FFFD, so nothing of it is certain before it ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from farflung.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_WINDOW = 8  # tokens kept when bad bytes never end: more than the 4 that one character can span
_LONGEST_WINDOW = 4 * _WINDOW


class Detokenizer:
    """The text of one growing list of ids. Decodes a few tokens per push, however long the text has become.

    Args:
        tokenizer: of the model.
        context: ids before the first one pushed (the prompt), so that a leading space is kept where the text goes on. What is
            given out then is what ``decode(context + ids)`` has more than ``decode(context)``.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._byte_ids = tokenizer.byte_token_ids
        self._window = [token for token in context[-_LONGEST_WINDOW:] if not tokenizer.is_silent(token)]
        self._settled = len(self._window)  # tokens of the window whose text is out in full
        self._given = len(tokenizer.decode(self._window))  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often empty, never a part of a character."""
        if self._tokenizer.is_silent(token_id):
            return ""
        self._window.append(token_id)
        if token_id in self._byte_ids:
            return ""
        text = self._tokenizer.decode(self._window)
        certain = text[:-1] if text.endswith(_REPLACEMENT) else text
        fresh = certain[self._given :]
        if len(certain) == len(text):
            self._restart(self._window[self._settled :], held=0)
        elif len(self._window) > _LONGEST_WINDOW:
            self._restart(self._window[-_WINDOW:], held=1)
        else:
            self._given = max(self._given, len(certain))
        return fresh

    def finish(self) -> str:
        """The rest: what was held back, as it stands. Nothing may be pushed afterwards."""
        return self._tokenizer.decode(self._window)[self._given :]

    def _restart(self, window: list[int], held: int) -> None:
        """Goes on with the last tokens alone, of whose text all but ``held`` characters are out."""
        self._window = window
        self._settled = len(window) if held == 0 else 0
        self._given = len(self._tokenizer.decode(window)) - held

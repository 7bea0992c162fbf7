"""A model's tokenizer: text and chats to token ids, ids to text.

The ids are those of ``transformers``' tokenizer for the same model; the work is done by the ``tokenizers`` library alone (see
``text.freeze`` for why).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from farflung.core.errors import UsageError
from farflung.text.freeze import cached_tokenizer

if TYPE_CHECKING:
    from farflung.text.chat import ChatTemplate, Message


class Tokenizer:
    """The tokenizer of one model.

    The first time takes as long as ``transformers`` needs; later starts read the cache (under a second).

    Args:
        path, kwargs: as for ``AutoTokenizer.from_pretrained(path, **kwargs)``: a folder; a folder and ``gguf_file``; a hub id.
            With a GGUF file give its ``tokenizer_type`` too, where it is known: transformers finds it ten times slower than it
            reads the vocabulary.
        cache: folder of frozen tokenizers; by default in the user's cache directory.
        clock: seconds since 1970, for chat templates that write today's date.

    Raises NotAModel where no tokenizer can be built, UnsupportedModel where it is of a kind we cannot use.
    """

    def __init__(
        self, path: str, kwargs: Mapping[str, Any], *, cache: Path | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        from tokenizers import Tokenizer as Pipeline

        frozen = cached_tokenizer(path, kwargs, cache or platformdirs.user_cache_path("farflung") / "tokenizers")
        self._facts = frozen.facts
        self._pipeline: Pipeline = Pipeline.from_buffer(frozen.pipeline)
        self._clock = clock

    def encode(self, text: str) -> list[int]:
        """Token ids, with the beginning-of-text token where the model wants it. Names of special tokens become these tokens.

        Raises UsageError where the text is none (half a surrogate pair, as broken JSON escapes give).
        """
        return self._ids(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins, by the model's chat template.

        Raises UsageError where the model has none or where it refuses the messages.
        """
        return self._ids(self._template.render(messages), add_special_tokens=False)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text has half a surrogate pair at character {error.start}: {text[error.start]!r}",
                hint="send UTF-8; an emoji in JSON needs both of its escapes",
            ) from error
        return list(self._pipeline.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._pipeline.decode(list(ids), skip_special_tokens=True)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, ascending."""
        return self._facts.eos_token_ids

    @property
    def has_chat_template(self) -> bool:
        return self._facts.chat_template is not None

    @property
    def vocab_size(self) -> int:
        """Tokens this tokenizer knows; a model's head may have more rows (padding)."""
        return self._pipeline.get_vocab_size()

    def is_silent(self, token_id: int) -> bool:
        """Whether ``decode`` leaves the token out: special ones, and ids beyond the vocabulary."""
        return token_id in self._special_ids or self._pipeline.id_to_token(token_id) is None

    @cached_property
    def byte_token_ids(self) -> frozenset[int]:
        """Tokens that stand for one byte of a character (byte fallback, as in SentencePiece). Adjacent ones are decoded as a
        run, so that a run's text is known only at its end."""
        letter = self._pipeline.token_to_id("<0x41>")
        if letter is None or self._pipeline.decode([letter]) != "A":
            return frozenset()  # a vocabulary may have such names and a decoder that takes them for text
        ids = (self._pipeline.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token for token in ids if token is not None)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(token for token, known in self._pipeline.get_added_tokens_decoder().items() if known.special)

    @cached_property
    def _template(self) -> ChatTemplate:
        from farflung.text.chat import ChatTemplate

        if self._facts.chat_template is None:
            raise UsageError(
                "this model has no chat template: it is a base model, which continues text",
                hint="use generate, or a model whose name says instruct, chat or it",
            )
        return ChatTemplate(self._facts.chat_template, self._facts.special_tokens, self._clock)

"""Which token follows which path, without a model: from recorded generations, or from a keyed hash.

A path has a *key*, 8 bytes: BLAKE2b of the key of the path before its last token, and that token. The next token depends on the
key alone, so it is the same whatever tree the path sits in, whichever windows brought it and whatever was repaired on the way:
a generation over any swarm can be compared with ``PathTokens.continuation``, token by token.

A trace is a file ``*.json`` with ``prompt_ids`` and ``out_ids``: the path along the prompt and the output has the recorded
tokens, every path that leaves it has hashed ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import msgspec

from farflung.core.errors import UsageError

KEY_BYTES = 8
TOKEN_BYTES = 4


class Trace(msgspec.Struct, frozen=True):
    """One recorded generation.

    Attributes:
        prompt_ids: what was asked.
        out_ids: what the model said.
        name, cat: what it is called, and which kind of text it is.
    """

    prompt_ids: tuple[int, ...]
    out_ids: tuple[int, ...]
    name: str = ""
    cat: str = ""


def read_traces(folder: Path) -> tuple[Trace, ...]:
    """The traces of a folder by name of file. Raises UsageError where there are none, or one cannot be read."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise UsageError(f"{folder} has no traces", hint="name a folder with *.json files that have prompt_ids and out_ids")
    traces = []
    for path in paths:
        try:
            trace = msgspec.json.decode(path.read_bytes(), type=Trace)
        except (OSError, msgspec.MsgspecError) as error:
            raise UsageError(f"{path} is no trace: {error}", hint="it needs prompt_ids and out_ids, lists of ids") from error
        if not trace.prompt_ids or not trace.out_ids:
            raise UsageError(f"{path} is no trace: its prompt or its output is empty")
        traces.append(trace)
    return tuple(traces)


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """What the tokens come from; equal sources give equal tokens.

    Attributes:
        vocab_size: tokens lie below it.
        seed: of the hash.
        traces: recorded paths.
    """

    vocab_size: int
    seed: int = 0
    traces: tuple[Trace, ...] = ()


class PathTokens:
    """Keys of paths and the tokens after them. Raises UsageError for a trace with tokens outside the vocabulary."""

    def __init__(self, source: TokenSource) -> None:
        self._vocab_size = source.vocab_size
        self.root = blake2b(source.seed.to_bytes(8, "little"), digest_size=KEY_BYTES).digest()
        self._recorded: dict[bytes, int] = {}
        for trace in source.traces:
            self._record(trace)

    def key(self, before: bytes, token: bytes) -> bytes:
        """The key of a path: of the one that it goes on from, and its last token (int32, little endian)."""
        return blake2b(before + token, digest_size=KEY_BYTES).digest()

    def key_of(self, path: Iterable[int], before: bytes | None = None) -> bytes:
        """The key of a whole path, or of its last part after ``before``."""
        key = self.root if before is None else before
        for token in path:
            key = self.key(key, token.to_bytes(TOKEN_BYTES, "little"))
        return key

    def token_after(self, key: bytes) -> int:
        """The next token after the path of that key."""
        recorded = self._recorded.get(key)
        return int.from_bytes(key, "little") % self._vocab_size if recorded is None else recorded

    def continuation(self, prompt: Sequence[int], count: int) -> list[int]:
        """The ``count`` tokens that follow a prompt: what every generation must give."""
        key, tokens = self.key_of(prompt), list[int]()
        for _ in range(count):
            tokens.append(self.token_after(key))
            key = self.key_of(tokens[-1:], key)
        return tokens

    def _record(self, trace: Trace) -> None:
        high = max(*trace.prompt_ids, *trace.out_ids)
        if high >= self._vocab_size or min(*trace.prompt_ids, *trace.out_ids) < 0:
            raise UsageError(
                f"trace {trace.name!r} has token {high}, the vocabulary {self._vocab_size}",
                hint="give the model the vocabulary that the traces were recorded with, or a larger one",
            )
        key = self.key_of(trace.prompt_ids)
        for token in trace.out_ids:
            self._recorded.setdefault(key, token)
            key = self.key_of((token,), key)

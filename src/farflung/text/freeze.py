"""A tokenizer as ``transformers`` builds it, frozen into one value that loads without ``transformers``.

Building one is slow: the import alone takes seconds (it brings torch), and a GGUF file up to twenty more. What comes out is a
``tokenizers`` pipeline and a few facts. These are kept in the user's cache (``cached_tokenizer``), so that every later start
takes a fraction of a second and gives the same ids, because it *is* the same pipeline.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from farflung.core.errors import NotAModel, UnsupportedModel

_FORMAT = 1  # part of the key: raise it when the facts or the way they are found change

_TOKENIZER_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}  # of the files that a tokenizer is built from

# Special tokens that end a text or a turn. A GGUF file names one end token only, and an instruct model emits others as well (as
# llama.cpp's vocabulary code, which searches for such names too). Folders say it all in generation_config.json.
_END_NAMES = {"<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<eos>", "</s>"}


class TokenizerFacts(msgspec.Struct, frozen=True):
    """What the pipeline itself does not say.

    Attributes:
        special_tokens: ``bos_token`` and the like, as chat templates see them.
        eos_token_ids: tokens that end a text, ascending.
        chat_template: Jinja source; None for a base model.
    """

    special_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]
    chat_template: str | None


@dataclass(frozen=True)
class FrozenTokenizer:
    """``pipeline`` is a tokenizer.json as the ``tokenizers`` library reads it."""

    facts: TokenizerFacts
    pipeline: bytes


class _Header(msgspec.Struct, frozen=True):
    """First line of a cache file; the pipeline follows."""

    facts: TokenizerFacts
    pipeline_blake3: str


def cached_tokenizer(path: str, kwargs: Mapping[str, Any], cache: Path) -> FrozenTokenizer:
    """The tokenizer that ``AutoTokenizer.from_pretrained(path, **kwargs)`` gives, from ``cache`` where nothing changed since.

    Only local sources are cached. The key is each file's path, size and modification time, and the versions of both libraries.
    A damaged cache file is built anew; a cache that cannot be written costs time and nothing else.

    Raises NotAModel, UnsupportedModel.
    """
    files = _source_files(path, kwargs)
    if not files:
        return freeze(path, kwargs)
    place = cache / f"{_key(files, kwargs)}.tokenizer"
    found = _read(place)
    if found is None:
        found = freeze(path, kwargs)
        _write(place, found)
    return found


def freeze(path: str, kwargs: Mapping[str, Any]) -> FrozenTokenizer:
    """Builds the tokenizer with ``transformers``; seconds. Raises NotAModel, UnsupportedModel."""
    _check_json(Path(path) / "tokenizer.json")
    from transformers import AutoTokenizer

    try:
        built = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **kwargs)  # None would ask, on a terminal
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, struct.error) as error:
        reason = str(error).strip().partition("\n")[0]
        raise NotAModel(
            f"no tokenizer can be built from {_name(path, kwargs)}: {reason}",
            hint="the folder needs tokenizer.json or tokenizer.model beside the weights; a GGUF file must be whole",
        ) from error
    backend = getattr(built, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(f"the tokenizer of {_name(path, kwargs)} ({type(built).__name__}) has no `tokenizers` pipeline")
    template = built.chat_template
    ends = _configured_ends(Path(path)) if "gguf_file" not in kwargs else _named_ends(backend)
    return FrozenTokenizer(
        TokenizerFacts(
            special_tokens={name: str(token) for name, token in built.special_tokens_map.items() if name.endswith("_token")},
            eos_token_ids=tuple(sorted({*ends, *([] if built.eos_token_id is None else [built.eos_token_id])})),
            chat_template=template.get("default") if isinstance(template, dict) else template,
        ),
        _compact(backend.to_str(pretty=False)),
    )


def _name(path: str, kwargs: Mapping[str, Any]) -> str:
    return str(Path(path) / kwargs["gguf_file"]) if "gguf_file" in kwargs else path


def _check_json(path: Path) -> None:
    """The tokenizers library raises a bare Exception for a damaged tokenizer.json: find that first."""
    if not path.is_file():
        return
    try:
        whole = json.loads(path.read_bytes())
    except ValueError as error:
        raise NotAModel(f"{path} is not JSON: {error}", hint="it may be cut short; fetch it again") from error
    if not isinstance(whole, dict) or "model" not in whole:
        raise NotAModel(f"{path} is no tokenizer: it has no 'model'", hint="fetch it again from where the model came from")


def _configured_ends(folder: Path) -> Iterable[int]:
    for name in ("generation_config.json", "config.json"):
        try:
            value = json.loads((folder / name).read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if value is not None:
            return [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]
    return []


def _named_ends(backend: Any) -> Iterable[int]:
    added = backend.get_added_tokens_decoder()
    return [token for token, known in added.items() if known.special and known.content in _END_NAMES]


def _compact(pipeline: str) -> bytes:
    """The same pipeline with BPE merges written as ``"a b"``, where no piece holds a space: loads a quarter faster."""
    whole = json.loads(pipeline)
    merges = whole["model"].get("merges")
    if whole["model"].get("type") == "BPE" and merges and not any(" " in piece for pair in merges for piece in pair):
        whole["model"]["merges"] = [" ".join(pair) for pair in merges]
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()


def _source_files(path: str, kwargs: Mapping[str, Any]) -> list[Path]:
    """The local files the tokenizer is built from; none for a hub id."""
    folder = Path(path)
    if "gguf_file" in kwargs:
        file = folder / kwargs["gguf_file"]
        return [file] if file.is_file() else []
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix in _TOKENIZER_SUFFIXES and file.is_file())


def _key(files: list[Path], kwargs: Mapping[str, Any]) -> str:
    status = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    versions = (_FORMAT, version("tokenizers"), version("transformers"))
    return blake3(repr((versions, status, sorted(kwargs.items()))).encode()).hexdigest()[:32]


def _read(place: Path) -> FrozenTokenizer | None:
    try:
        head, _, pipeline = place.read_bytes().partition(b"\n")
        header = msgspec.json.decode(head, type=_Header)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if blake3(pipeline).hexdigest() != header.pipeline_blake3:
        return None
    return FrozenTokenizer(header.facts, pipeline)


def _write(place: Path, frozen: FrozenTokenizer) -> None:
    head = msgspec.json.encode(_Header(frozen.facts, blake3(frozen.pipeline).hexdigest()))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=place.parent, prefix=place.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines((head, b"\n", frozen.pipeline))
            os.replace(aside, place)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError:
        return  # no space, read-only home: the next start is slow again

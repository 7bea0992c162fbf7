"""Models in the layout of the hub: ``config.json``, tokenizer files and safetensors, one file or shards with an index.

The same code reads a folder and a hub repository; they differ in how a file name becomes a path (``Files``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import msgspec
import torch
from blake3 import blake3

from farflung.core.errors import CorruptWeights, ModelError, NotAModel, UnsupportedModel
from farflung.engine.conversion import parameter_origins
from farflung.engine.manifest import CONFIG, TOKENIZER, Leaf, ModelManifest
from farflung.engine.safetensors_file import read_header
from farflung.engine.skeleton import Config, Skeleton, refuse_absurd, understood
from farflung.engine.source import ModelSource, Progress, SourceKind, Stored, StoredTensor

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MANIFEST = "farflung-manifest.json"
MAX_JSON_BYTES = 64 * 1024**2

_TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

T = TypeVar("T")


class Files(Protocol):
    """Where the files of one model are."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> SourceKind: ...

    @property
    def folder(self) -> Path:
        """Where small files are once they were asked for."""

    def get(self, name: str) -> Path | None:
        """The file, fetched first where needed; None where the model has none of that name."""

    def has(self, name: str) -> bool:
        """Whether the model has such a file."""

    def is_here(self, name: str) -> bool:
        """Whether the file can be read without fetching."""


class Folder:
    """A folder on this machine."""

    kind: SourceKind = "safetensors"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.resolve().name

    def get(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() else None

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def is_here(self, name: str) -> bool:
        return self.has(name)


class SafetensorsSource(ModelSource):
    """See ``ModelSource``."""

    def __init__(self, files: Files, cache: Path | None = None) -> None:
        super().__init__(cache)
        self._files = files
        self.name, self.kind = files.name, files.kind
        self._config = _read_json(self._need("config.json"), dict[str, Any])
        self.path = files.folder
        if not isinstance(self._config.get("model_type"), str):
            raise NotAModel(f"{files.name}: config.json names no model_type")
        refuse_absurd(self._config)
        self._shard_of = self._find_shards()

    @classmethod
    def of_folder(cls, folder: Path, *, cache: Path | None = None) -> SafetensorsSource:
        return cls(Folder(folder), cache)

    @classmethod
    def of_hub(cls, repository: str, *, cache: Path | None = None) -> SafetensorsSource:
        from farflung.engine.hub import HubFiles

        return cls(HubFiles(repository), cache)

    def config(self) -> Config:
        from transformers import CONFIG_MAPPING, AutoConfig

        if self._config.get("auto_map") and self._config["model_type"] not in CONFIG_MAPPING:
            raise UnsupportedModel(
                f"{self.name}: family {self._config['model_type']!r} is code that comes with the model, which is never run here"
            )
        with understood(self.name):
            return AutoConfig.from_pretrained(str(self.path), local_files_only=True, trust_remote_code=False)

    def tokenizer_arguments(self) -> tuple[str, dict[str, Any]]:
        for name in TOKENIZER_FILES:
            self._files.get(name)
        return str(self.path), {"local_files_only": True}

    def eos_token_ids(self) -> tuple[int, ...]:
        found = self._config.get("eos_token_id")
        if generation := self._files.get("generation_config.json"):
            found = _read_json(generation, dict[str, Any]).get("eos_token_id", found)
        ids = found if isinstance(found, list) else [found]
        return tuple(sorted({value for value in ids if isinstance(value, int)}))

    def tensors(self, skeleton: Skeleton, wanted: Collection[str] | None = None) -> Mapping[str, Stored]:
        found = parameter_origins(skeleton, self._shard_of, self.name)
        return {
            parameter: origin.stored(lambda name: self._headers(self._shard_of[name])[name])
            for parameter, origin in found.items()
            if wanted is None or parameter in wanted
        }

    def decode(self, tensor: StoredTensor, source_bytes: bytearray, dtype: torch.dtype | None) -> torch.Tensor:
        kind = _TORCH.get(tensor.dtype)
        if kind is None:
            raise UnsupportedModel(f"tensor {tensor.name!r} has element type {tensor.dtype}, which is not computed with here")
        value = torch.frombuffer(source_bytes, dtype=kind) if source_bytes else torch.empty(0, dtype=kind)
        wanted = dtype if dtype is not None and kind.is_floating_point else kind
        return value.reshape(tensor.shape).to(
            wanted, copy=True
        )  # into memory aligned for vector loads, as source bytes are not

    def texts(self) -> Iterable[Leaf]:
        for kind, names in ((CONFIG, CONFIG_FILES), (TOKENIZER, TOKENIZER_FILES)):
            for name in names:
                if path := self._files.get(name):
                    yield Leaf(kind, name, "", (), blake3(path.read_bytes()).hexdigest())

    def stored(self) -> Collection[StoredTensor]:
        return [self._headers(shard)[name] for name, shard in self._shard_of.items()]

    def files(self) -> Collection[Path]:
        names = [*CONFIG_FILES, *TOKENIZER_FILES, *self._shards()]
        return [path for name in names if (path := self._files.get(name))]

    def manifest(self, *, progress: Progress | None = None) -> ModelManifest:
        """As in ``ModelSource``; a ``farflung-manifest.json`` beside the weights is taken at its word, since a stage checks
        every tensor it loads. Without one, a hub model needs all its shards here; raises ModelError where they are not."""
        if self._manifest is None and (path := self._files.get(MANIFEST)):
            self._manifest = ModelManifest.load(path)
        away = [shard for shard in self._shards() if not self._files.is_here(shard)]
        if self._manifest is None and away:
            raise ModelError(
                f"{self.name} has no {MANIFEST}, and {len(away)} of its {len(self._shards())} weight files are not here",
                hint=f"fetch the whole model once with: farflung models fetch {self.name}",
            )
        return super().manifest(progress=progress)

    def _need(self, name: str) -> Path:
        path = self._files.get(name)
        if path is None:
            raise NotAModel(
                f"{self._files.folder} is no model: it has no {name}",
                hint=f"a model folder holds config.json, tokenizer files and {SINGLE} or {INDEX}",
            )
        return path

    def _find_shards(self) -> dict[str, str]:
        """File of every stored tensor."""
        if index := self._files.get(INDEX):
            return self._checked_index(index)
        if path := self._files.get(SINGLE):
            return {tensor.name: path.name for tensor in self._headers(SINGLE).values()}
        raise NotAModel(
            f"{self.path} holds no weights: looked for {SINGLE} and {INDEX}",
            hint="pickled weights (pytorch_model.bin) are not read: save the model as safetensors"
            if self._files.has("pytorch_model.bin")
            else "complete the folder, or give a .gguf file",
        )

    def _checked_index(self, index: Path) -> dict[str, str]:
        shard_of = _read_json(index, _Index).weight_map
        shards = sorted(set(shard_of.values()))
        for shard in shards:
            if PurePosixPath(shard).name != shard or "\\" in shard:
                raise CorruptWeights(f"{index} names a weight file outside its folder: {shard!r}")
        missing = [shard for shard in shards if not self._files.has(shard)]
        if missing:
            raise CorruptWeights(
                f"{self.name} lacks {len(missing)} of its {len(shards)} weight files: {', '.join(missing[:5])}",
                hint="fetch the missing files",
            )
        return shard_of

    def _shards(self) -> list[str]:
        return sorted(set(self._shard_of.values()))

    @cached_property
    def _header_cache(self) -> dict[str, dict[str, StoredTensor]]:
        return {}

    def _headers(self, shard: str) -> dict[str, StoredTensor]:
        if shard not in self._header_cache:
            path = self._files.get(shard)
            if path is None:
                raise ModelError(
                    f"{self.name}: the weight file {shard} is not in {self.path}", hint="fetch it; the hub could not be reached"
                )
            found = {tensor.name: tensor for tensor in read_header(path)}
            if hasattr(self, "_shard_of"):
                lost = [name for name, place in self._shard_of.items() if place == shard and name not in found]
                if lost:
                    raise CorruptWeights(f"{path} lacks {len(lost)} tensors that the index promises, the first is {lost[0]!r}")
            self._header_cache[shard] = found
        return self._header_cache[shard]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _read_json(path: Path, kind: type[T]) -> T:
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CorruptWeights(f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} such a file may have")
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise NotAModel(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptWeights(f"{path} is garbled: {error}", hint="fetch the file again") from error

"""Where a model's parts come from: one interface over folders, hub repositories and GGUF files.

A source knows what is stored (names, types, byte ranges) without reading it, reads single tensors, and hashes them. Which
stored tensor belongs to which parameter of the ``transformers`` class is its own affair (``tensors``); which parameters a stage
needs is the loader's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from blake3 import blake3

from farflung.core.errors import CorruptWeights
from farflung.core.model import ModelSpec
from farflung.engine.manifest import TENSOR, Leaf, ModelManifest
from farflung.engine.manifest_cache import cached_manifest, default_cache

if TYPE_CHECKING:
    import torch

    from farflung.engine.skeleton import Config, Skeleton

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)`` in bytes, from 0 to total. Called from the thread that does the work."""

SourceKind = Literal["gguf", "safetensors", "hub"]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file.

    Attributes:
        name: in the file.
        dtype: as the file names it: ``BF16``, ``Q4_K``.
        shape: outermost dimension first.
        path, offset, nbytes: where its bytes are; checked to lie inside the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def leaves(self) -> tuple[Leaf, ...]:
        """Its one leaf, as other ``Stored`` have several."""
        return (self.leaf(),)

    def read_bytes(self) -> bytearray:
        """The source bytes. Raises CorruptWeights where the file ends before them."""
        buffer = bytearray(self.nbytes)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                view, done = memoryview(buffer), 0
                while done < self.nbytes and (count := file.readinto(view[done:])):
                    done += count
        except OSError as error:
            raise CorruptWeights(f"{self.path} cannot be read: {error.strerror}") from error
        if done < self.nbytes:
            raise CorruptWeights(
                f"{self.path} ends inside tensor {self.name!r}: {done} of {self.nbytes} bytes at offset {self.offset}",
                hint="the file became shorter while it was in use; fetch it again",
            )
        return buffer

    def leaf(self, source_bytes: bytearray | None = None) -> Leaf:
        """Its leaf of the manifest, from bytes already read or from the file."""
        data = self.read_bytes() if source_bytes is None else source_bytes
        hasher = blake3(max_threads=blake3.AUTO)
        return Leaf(TENSOR, self.name, self.dtype, self.shape, hasher.update(data).hexdigest())


@dataclass(frozen=True)
class Assembled:
    """A parameter that is put together from several stored tensors, or is a part of one (fused experts, fused q, k and v).

    Attributes:
        parts: what is read, in order.
        make: the parameter from the values of ``parts``.
    """

    parts: tuple[StoredTensor, ...]
    make: Callable[[Sequence[torch.Tensor]], torch.Tensor]

    @property
    def name(self) -> str:
        return self.parts[0].name if len(self.parts) == 1 else f"{self.parts[0].name} and {len(self.parts) - 1} more"

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(part.leaf() for part in self.parts)


Stored = StoredTensor | Assembled


class ModelSource(ABC):
    """One model, opened.

    Attributes:
        name: what people call it.
        kind: what it is made of.
        path: the folder or file; of a hub model, the folder of its snapshot in the local cache.
    """

    name: str
    kind: SourceKind
    path: Path

    def __init__(self, cache: Path | None = None) -> None:
        """Args: cache: folder for manifests; None for the user's cache directory."""
        self._cache = cache or default_cache()
        self._manifest: ModelManifest | None = None

    @abstractmethod
    def config(self) -> Config:
        """The model's ``transformers`` configuration, a fresh copy. Raises UnsupportedModel for an unknown family."""

    @abstractmethod
    def tokenizer_arguments(self) -> tuple[str, dict[str, Any]]:
        """What to call ``AutoTokenizer.from_pretrained`` with: ``from_pretrained(path, **kwargs)``."""

    @abstractmethod
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    @abstractmethod
    def tensors(self, skeleton: Skeleton, wanted: Collection[str] | None = None) -> Mapping[str, Stored]:
        """Which stored tensor holds each parameter of ``skeleton``, by parameter name; only those of ``wanted`` where given
        (a hub source then fetches only the shards that hold them). A parameter that is not stored has no entry.

        Raises UnsupportedModel where the stored tensors need a conversion that is not known to be right.
        """

    @abstractmethod
    def decode(self, tensor: StoredTensor, source_bytes: bytearray, dtype: torch.dtype | None) -> torch.Tensor:
        """The parameter's value from its source bytes, in ``dtype`` (None: as stored, float32 where quantised). May share
        memory with ``source_bytes``."""

    @abstractmethod
    def texts(self) -> Iterable[Leaf]:
        """Leaves of configuration and tokenizer, hashed from the files as they are now."""

    @abstractmethod
    def stored(self) -> Collection[StoredTensor]:
        """Every stored tensor. Of a hub model this needs every shard."""

    @abstractmethod
    def files(self) -> Collection[Path]:
        """Every file that counts for the manifest."""

    def read(self, tensor: Stored, dtype: torch.dtype | None = None, *, against: ModelManifest | None = None) -> torch.Tensor:
        """Reads one tensor, and nothing else; with ``against``, checks that its bytes are those of the manifest.

        Raises CorruptWeights, naming the tensor.
        """
        if isinstance(tensor, Assembled):
            return tensor.make([self.read(part, dtype, against=against) for part in tensor.parts])
        source_bytes = tensor.read_bytes()
        if against is not None:
            against.check(tensor.leaf(source_bytes))
        return self.decode(tensor, source_bytes, dtype)

    def manifest(self, *, progress: Progress | None = None) -> ModelManifest:
        """Digest and leaves of the whole model. Hashes every file the first time and remembers it until a file changes."""
        if self._manifest is None:
            self._manifest = cached_manifest(self.files(), self._cache, lambda: self._hash_all(progress))
        return self._manifest

    def spec(self, *, progress: Progress | None = None) -> ModelSpec:
        """Name, shape and digest. Raises UnsupportedModel where the configuration lacks a number."""
        from farflung.engine.skeleton import describe

        return describe(self.config(), self.name, self.manifest(progress=progress).digest, self.eos_token_ids())

    def _hash_all(self, progress: Progress | None) -> ModelManifest:
        tensors = self.stored()
        total, done = sum(tensor.nbytes for tensor in tensors), 0
        leaves = list(self.texts())
        for tensor in tensors:
            if progress:
                progress("hashing", done, total)
            leaves.append(tensor.leaf())
            done += tensor.nbytes
        if progress:
            progress("hashing", total, total)
        return ModelManifest.of(leaves)

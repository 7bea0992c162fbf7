"""Models in one GGUF file: transformers' own rules for configuration, names and rewritten values, our own reading.

Parameters come out equal to the bit to what ``AutoModelForCausalLM.from_pretrained(folder, gguf_file=...)`` makes of the file,
in seconds, and only those asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from blake3 import blake3

from farflung.core.errors import CorruptWeights, UnsupportedModel
from farflung.engine.dequant import dequantise
from farflung.engine.gguf_file import Field, read_header
from farflung.engine.manifest import CONFIG, TOKENIZER, Leaf
from farflung.engine.skeleton import Config, Skeleton, refuse_absurd, understood
from farflung.engine.source import ModelSource, StoredTensor

MAX_CONFIG_ENTRIES = 4096
"""Arrays longer than this are vocabulary, not configuration (the longest of the latter has one entry per layer)."""


class GgufSource(ModelSource):
    """See ``ModelSource``."""

    kind = "gguf"

    def __init__(self, path: Path, *, name: str = "", cache: Path | None = None) -> None:
        """Args: path: the file. name: what people call it; its stem by default."""
        super().__init__(cache)
        self.path, self.name = path, name or path.stem
        self._header = read_header(path)
        self._stored = {tensor.name: tensor for tensor in self._header.tensors}
        architecture = self._header.text("general.architecture")
        if not architecture or not self._stored:
            raise CorruptWeights(f"{path} has no general.architecture or no tensors ({len(self._stored)})")
        self._architecture = architecture
        refuse_absurd({field.key: field.value for field in self._header.fields.values()})

    def config(self) -> Config:
        from transformers import AutoConfig

        with TemporaryDirectory(prefix="farflung-") as folder:
            Path(folder, "front.gguf").write_bytes(self._front())
            with understood(f"{self.name} ({self._architecture})"):
                config = AutoConfig.from_pretrained(folder, gguf_file="front.gguf", trust_remote_code=False)
        config.name_or_path = str(self.path)
        return config

    def tokenizer_arguments(self) -> tuple[str, dict[str, Any]]:
        return str(self.path.parent), {"gguf_file": self.path.name, "local_files_only": True}

    def eos_token_ids(self) -> tuple[int, ...]:
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        return tuple(sorted({number for key in keys if (number := self._header.number(key)) is not None}))

    def tensors(self, skeleton: Skeleton, wanted: Collection[str] | None = None) -> Mapping[str, StoredTensor]:
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        with understood(self.name):
            parameter_of = get_gguf_hf_weights_map(_Names(skeleton, skeleton.base_model_prefix), self._processor)
        found: dict[str, StoredTensor] = {}
        for stored in self._stored.values():
            name = parameter_of.get(stored.name)
            if name is None:
                raise UnsupportedModel(f"{self.name}: tensor {stored.name!r} has no place in {type(skeleton).__name__}")
            if name in found:
                raise UnsupportedModel(
                    f"{self.name}: {name} must be put together from {found[name].name!r} and {stored.name!r}, "
                    "which is not done here yet"
                )
            found[name] = stored
        return {name: stored for name, stored in found.items() if wanted is None or name in wanted}

    def decode(self, tensor: StoredTensor, source_bytes: bytearray, dtype: torch.dtype | None) -> torch.Tensor:
        from transformers.modeling_gguf_pytorch_utils import TensorProcessor

        dtype = dtype or torch.float32
        if type(self._processor).process is TensorProcessor.process:  # keeps values: no float32 copy beside the result
            return dequantise(source_bytes, tensor.dtype, tensor.shape, dtype)
        values = dequantise(source_bytes, tensor.dtype, tensor.shape, torch.float32)
        processed = self._processor.process(values.numpy(), tensor.name)
        if processed.name != tensor.name:
            raise UnsupportedModel(f"{self.name}: tensor {tensor.name!r} must be taken apart, which is not done here yet")
        return torch.from_numpy(processed.weights).contiguous().to(dtype)

    def texts(self) -> Iterable[Leaf]:
        """Metadata is one leaf of configuration and one of tokenizer: the bytes of their fields, in file order."""
        hashers = {CONFIG: blake3(), TOKENIZER: blake3()}
        with self.path.open("rb") as file:
            for field in self._header.fields.values():
                kind = TOKENIZER if field.key.startswith("tokenizer.") else CONFIG
                hashers[kind].update(_field_bytes(file, field))
        for kind, hasher in hashers.items():
            yield Leaf(kind, "gguf metadata", "", (), hasher.hexdigest())

    def stored(self) -> Collection[StoredTensor]:
        return self._stored.values()

    def files(self) -> Collection[Path]:
        return [self.path]

    @cached_property
    def _processor(self) -> Any:
        """transformers' rewriting of values for this architecture (rotary order of llama, norms of gemma)."""
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        config = self.config()
        return TENSOR_PROCESSORS.get(self._architecture, TensorProcessor)(config=config.to_dict())

    def _front(self) -> bytes:
        """A small GGUF file from which transformers builds the same configuration: all metadata but the vocabulary, whose size
        stands in for it, and all tensor names, of one value each. Reading the whole takes it 10 seconds."""
        with self.path.open("rb") as file:
            fields = [
                _field_bytes(file, field)
                for field in self._header.fields.values()
                if field.count is None or field.count <= MAX_CONFIG_ENTRIES
            ]
        size_key = f"{self._architecture}.vocab_size"
        tokens = self._header.fields.get("tokenizer.ggml.tokens")
        if size_key not in self._header.fields and tokens is not None and tokens.count is not None:
            fields.append(_string(size_key) + struct.pack("<II", 4, tokens.count))
        rows = [_string(name) + struct.pack("<IQIQ", 1, 1, 0, 0) for name in self._stored]
        front = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(fields)) + b"".join(fields) + b"".join(rows)
        return front + bytes(-len(front) % 65536 + 65536)


class _Names:
    """What transformers' naming asks of a model: its parameters and its children's. It makes a table for every module of the
    tree (319 in Qwen2.5-0.5B, four seconds); the whole and its text model are the two that name anything."""

    def __init__(self, module: Any, child: str = "") -> None:
        self.config = module.config
        self._module, self._child = module, child

    def state_dict(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = self._module.state_dict()
        return found

    def named_children(self) -> list[tuple[str, _Names]]:
        return [(self._child, _Names(getattr(self._module, self._child)))] if self._child else []


def _field_bytes(file: Any, field: Field) -> bytes:
    file.seek(field.start)
    data: bytes = file.read(field.stop - field.start)
    if len(data) != field.stop - field.start:
        raise CorruptWeights(f"{file.name} became shorter while it was read: field {field.key!r} ends at byte {field.stop}")
    return data


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data

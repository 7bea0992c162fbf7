"""The front of a GGUF file: metadata and tensor table, every size checked against the file before it is believed.

``gguf.GGUFReader`` maps first and checks nothing (a truncated file ends in a numpy error), and takes 8 to 12 seconds for a
vocabulary of 260,000 entries, one array view each; this walk takes a tenth of a second and leaves the vocabulary alone.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import NoReturn

import gguf

from farflung.core.errors import CorruptWeights, NotAModel, UnsupportedModel
from farflung.engine.source import StoredTensor

MAX_FIELDS, MAX_TENSORS, MAX_DIMENSIONS, MAX_NAME_BYTES = 100_000, 1_000_000, 8, 65_535

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}

Scalar = str | int | float | bool


@dataclass(frozen=True)
class Field:
    """One piece of metadata.

    Attributes:
        key: its name, e.g. ``qwen2.block_count``.
        start, stop: its bytes in the file, key and type included.
        count: entries of an array; None of a scalar.
        value: of a scalar; None of an array.
    """

    key: str
    start: int
    stop: int
    count: int | None
    value: Scalar | None


@dataclass(frozen=True)
class GgufHeader:
    """Attributes:
    version: of the format.
    fields: by key, in file order.
    tensors: in file order.
    """

    version: int
    fields: dict[str, Field]
    tensors: tuple[StoredTensor, ...]

    def text(self, key: str) -> str | None:
        """A string of the metadata; None where it is absent or no string."""
        value = self.fields[key].value if key in self.fields else None
        return value if isinstance(value, str) else None

    def number(self, key: str) -> int | None:
        """An integer of the metadata; None where it is absent or no integer."""
        value = self.fields[key].value if key in self.fields else None
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_header(path: Path) -> GgufHeader:
    """Raises NotAModel for a file that is no GGUF, CorruptWeights, with the numbers, for one that is cut off or inconsistent,
    UnsupportedModel for a version or tensor type that is not read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Walk(file, path, size).header()
    except OSError as error:
        raise NotAModel(f"{path} cannot be read: {error.strerror}") from error


class _Walk:
    """Reads forward through a file, never past its end."""

    def __init__(self, file: BufferedReader, path: Path, size: int) -> None:
        self._file, self._path, self._size, self._at = file, path, size, 0

    def header(self) -> GgufHeader:
        if self._size < 24 or self._take(4) != b"GGUF":
            raise NotAModel(
                f"{self._path} is no model: {self._size} bytes that do not begin as a GGUF file does",
                hint="a model is a .gguf file or a folder with config.json and safetensors",
            )
        version = self._number("<I")
        if version not in (2, 3):
            raise UnsupportedModel(f"{self._path} is GGUF version {version}; versions 2 and 3 (little-endian) are read")
        tensor_count, field_count = self._number("<Q"), self._number("<Q")
        if field_count > MAX_FIELDS or tensor_count > MAX_TENSORS:
            self._fail(f"announces {field_count} fields and {tensor_count} tensors")
        fields: dict[str, Field] = {}
        for _ in range(field_count):
            field = self._field()
            if field.key in fields:
                self._fail(f"has the field {field.key!r} twice")
            fields[field.key] = field
        rows = [self._tensor_row() for _ in range(tensor_count)]
        alignment = fields["general.alignment"].value if "general.alignment" in fields else gguf.GGUF_DEFAULT_ALIGNMENT
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self._fail(f"has the alignment {alignment!r}, which is no power of two")
        start = -(-self._at // alignment) * alignment
        return GgufHeader(version, fields, self._place(rows, start))

    def _field(self) -> Field:
        start = self._at
        key = self._string(MAX_NAME_BYTES)
        kind = self._number("<I")
        count: int | None = None
        value: Scalar | None = None
        if kind == _ARRAY:
            entry, count = self._number("<I"), self._number("<Q")
            self._skip_array(key, entry, count)
        else:
            value = self._scalar(key, kind)
        return Field(key, start, self._at, count, value)

    def _scalar(self, key: str, kind: int) -> Scalar:
        if kind == _STRING:
            return self._string(self._size)
        if kind not in _SCALARS:
            self._fail(f"has the field {key!r} of unknown type {kind}")
        (value,) = struct.unpack(_SCALARS[kind], self._take(struct.calcsize(_SCALARS[kind])))
        found: int | float | bool = value
        return found

    def _skip_array(self, key: str, entry: int, count: int) -> None:
        if entry in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[entry]))
        elif entry == _STRING:
            if count > (self._size - self._at) // 8:
                self._fail(f"announces {count} strings in {key!r}, more than fit into its {self._size} bytes")
            for _ in range(count):
                self._skip(self._number("<Q"))
        else:
            self._fail(f"has the field {key!r}, an array of unknown type {entry}")

    def _tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(MAX_NAME_BYTES)
        dimensions = self._number("<I")
        if dimensions > MAX_DIMENSIONS:
            self._fail(f"gives tensor {name!r} {dimensions} dimensions")
        sizes = tuple(self._number("<Q") for _ in range(dimensions))
        return name, sizes[::-1], self._number("<I"), self._number("<Q")

    def _place(self, rows: list[tuple[str, tuple[int, ...], int, int]], start: int) -> tuple[StoredTensor, ...]:
        """Names, types and byte ranges of the tensors, each inside the file."""
        found: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in rows:
            try:
                type_ = gguf.GGMLQuantizationType(kind)
            except ValueError as error:
                raise UnsupportedModel(f"tensor {name!r} of {self._path} has type {kind}, which is not known here") from error
            block_values, block_bytes = gguf.GGML_QUANT_SIZES[type_]
            values = prod(shape)
            if name in found or not values or not shape or shape[-1] % block_values:
                self._fail(f"describes tensor {name!r} as {type_.name} {list(shape)}, or twice")
            tensor = StoredTensor(name, type_.name, shape, self._path, start + offset, values // block_values * block_bytes)
            end = tensor.offset + tensor.nbytes
            if end > self._size:
                raise CorruptWeights(
                    f"{self._path} is truncated: tensor {name!r} ends at byte {end}, the file at {self._size}",
                    hint="fetch the file again",
                )
            found[name] = tensor
        return tuple(found.values())

    def _string(self, limit: int) -> str:
        length = self._number("<Q")
        if length > limit:
            self._fail(f"announces a name of {length} bytes at byte {self._at}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            self._fail(f"has text at byte {self._at} that is no UTF-8: {error.reason}")

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(value)

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            self._fail(f"ends at byte {self._size}, inside its header, which needs {count} bytes at {self._at}")
        data = self._file.read(count)
        if len(data) != count:
            self._fail(f"ends at byte {self._at + len(data)} while it is read")
        self._at += count
        return data

    def _skip(self, count: int) -> None:
        if count > self._size - self._at:
            self._fail(f"ends at byte {self._size}, inside its header, which needs {count} bytes at {self._at}")
        self._file.seek(count, 1)
        self._at += count

    def _fail(self, what: str) -> NoReturn:
        raise CorruptWeights(f"{self._path} {what}", hint="the file is truncated or damaged; fetch it again")

"""The header of a safetensors file: what is stored where, checked against the size of the file before anything is read.

Format: eight bytes little-endian header length, a JSON object of ``{name: {dtype, shape, data_offsets}}``, then the data
without holes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import msgspec

from farflung.core.errors import CorruptWeights, UnsupportedModel
from farflung.engine.source import StoredTensor

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_header(path: Path) -> list[StoredTensor]:
    """Every tensor of the file, in the order of its data.

    Raises CorruptWeights, with the numbers, where the header is no header or does not fit the file; UnsupportedModel for an
    element type that is not known.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CorruptWeights(
                    f"{path} has {size} bytes and announces a header of {length}: it is truncated or no safetensors file",
                    hint="fetch the file again",
                )
            text = file.read(length)
    except OSError as error:
        raise CorruptWeights(f"{path} cannot be read: {error.strerror}") from error
    try:
        fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in fields.items() if name != "__metadata__"}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptWeights(f"{path} has a garbled header: {error}", hint="fetch the file again") from error
    return _checked(path, entries, start=8 + length, size=size)


def _checked(path: Path, entries: dict[str, _Entry], start: int, size: int) -> list[StoredTensor]:
    found: list[StoredTensor] = []
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].data_offsets, item[0])):
        if entry.dtype not in DTYPE_BYTES:
            raise UnsupportedModel(f"tensor {name!r} of {path} has element type {entry.dtype!r}, which is not read here")
        begin, stop = entry.data_offsets
        nbytes = prod(entry.shape) * DTYPE_BYTES[entry.dtype]
        if min(entry.shape, default=0) < 0 or begin != end or stop - begin != nbytes:
            raise CorruptWeights(
                f"tensor {name!r} of {path} lies at {begin}:{stop}, but {entry.dtype} {entry.shape} after {end} takes {nbytes}",
                hint="the header is damaged; fetch the file again",
            )
        found.append(StoredTensor(name, entry.dtype, tuple(entry.shape), path, start + begin, nbytes))
        end = stop
    if start + end != size:
        what = "truncated" if size < start + end else "followed by bytes that belong to nothing"
        raise CorruptWeights(f"{path} is {what}: {size} bytes, its header describes {start + end}", hint="fetch the file again")
    return found

"""Quantised GGUF blocks to floats, by ``gguf.quants``, in pieces that stay in the cache.

Handed a whole tensor, ``gguf.dequantize`` works in groups of 16 rows, which for short rows is mostly the cost of calls (24 ns a
value measured on rows of 640); in pieces of this size it takes 2 to 6 ns. A second thread gained nothing worth its code.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch

from farflung.core.errors import UnsupportedModel

VALUES_PER_PIECE = 1 << 17
"""512 KB of float32. Measured a value: 2**13 8 ns, 2**17 and 2**19 3 ns, but 2**19 11 ns in Q5_0, which leaves the cache."""

VALUES_PER_CAST = 1 << 14
"""Below torch's grain of 32,768 values: waking its threads for every piece costs seconds where the cores are busy."""

_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dequantise(source: bytearray, type_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor of ``shape`` (outermost first) in ``dtype``, rounded once from float32.

    Args:
        source: as many bytes as shape and type need (the caller has checked), at least one. The result may share them.
        type_name: of ``gguf.GGMLQuantizationType``.

    Raises UnsupportedModel for a type that cannot be dequantised.
    """
    if type_name in _PLAIN:
        return torch.frombuffer(source, dtype=_PLAIN[type_name]).reshape(shape).to(dtype)
    kind = gguf.GGMLQuantizationType[type_name]
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.frombuffer(source, dtype=np.uint8).reshape(-1, block_bytes)
    out = torch.empty(blocks.shape[0] * block_values, dtype=dtype)
    step = max(1, VALUES_PER_PIECE // block_values)
    try:
        for start in range(0, blocks.shape[0], step):
            values = torch.from_numpy(gguf.dequantize(blocks[start : start + step].reshape(1, -1), kind)).reshape(-1)
            place = out[start * block_values :]
            for first in range(0, values.numel(), VALUES_PER_CAST):
                part = values[first : first + VALUES_PER_CAST]
                place[first : first + part.numel()] = part
    except NotImplementedError as error:
        raise UnsupportedModel(f"tensors of type {type_name} cannot be read: {error}") from error
    return out.reshape(shape)

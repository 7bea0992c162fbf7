"""The codecs of ``wire.codec`` for tensors: the same bytes, from and to wherever the tensor lies.

On a CPU a tensor's memory is lent to numpy, which is faster there (``bench/codecs.py`` compares them). Elsewhere int8 and int4
are computed on the device, so that a quarter of the bytes, or less, cross the bus. Two traps on the way to equal bytes: on
CUDA torch may divide by a *number* by multiplying with its reciprocal, so divisors are tensors; and the AVX-512 instruction
that converts to bfloat16 flushes denormals, so rounding is integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from farflung.core.errors import CodecError
from farflung.wire import floats, int4, int8
from farflung.wire.codec import codec
from farflung.wire.floats import Bytes
from farflung.wire.frame import Buffer


def encode(name: str, rows: torch.Tensor) -> bytes:
    """Codes ``rows`` [n, width] of any float type on any device, as ``wire.codec`` codes them as float32.

    bfloat16 rows go into the bf16 codec as they are. Raises CodecError as ``wire.codec.Codec.encode`` does.
    """
    found = codec(name)
    if rows.ndim != 2 or not rows.is_floating_point():
        raise CodecError(f"{name} takes floats [rows, width], not {rows.dtype} {list(rows.shape)}")
    rows = rows.detach()
    if name == "bf16" and rows.dtype == torch.bfloat16:
        found.row_bytes(rows.shape[1])
        bits = rows.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
        floats.refuse_bits(bits)
        coded: bytes = bits.tobytes()
        return coded
    if name in ON_DEVICE and rows.device.type != "cpu":
        found.row_bytes(rows.shape[1])
        return ON_DEVICE[name].encode(rows.float())
    return found.encode(rows.to("cpu", torch.float32).numpy())


def decode(
    name: str, buffer: Buffer, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The rows in ``buffer`` as a new tensor [n, width]; n follows from the size.

    Raises CodecError as ``wire.codec.Codec.decode`` does.
    """
    found = codec(name)
    target = device if isinstance(device, torch.device) else torch.device(device)
    if name == "bf16" and dtype == torch.bfloat16:
        n = found.rows_in(memoryview(buffer).nbytes, width)
        bits = np.frombuffer(buffer, np.uint16).reshape(n, width).copy()
        floats.refuse_bits(bits)
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).to(target)
    if name in ON_DEVICE and target.type != "cpu":
        n = found.rows_in(memoryview(buffer).nbytes, width)
        raw = np.frombuffer(buffer, np.uint8).reshape(n, found.row_bytes(width))
        ON_DEVICE[name].refuse_heads(raw, width)
        return ON_DEVICE[name].decode(torch.from_numpy(raw.copy()).to(target), width).to(dtype)
    return torch.from_numpy(found.decode(buffer, width)).to(target, dtype)


def encode_int8_on_device(rows: torch.Tensor) -> bytes:
    """``wire.int8.encode`` in torch's operators: float32 [n, width], on the device where it lies.

    Raises CodecError where a value is not finite or too large.
    """
    n, width = rows.shape
    if n == 0:
        return b""
    layout = int8.layout(width)
    values = torch.zeros((n, layout.blocks * int8.BLOCK), dtype=torch.float32, device=rows.device)
    values[:, :width] = rows
    sizes = values.abs()
    found = []
    for _ in range(layout.kept):
        position = sizes.argmax(dim=1, keepdim=True)  # the first of equal ones, by torch's documentation
        sizes.scatter_(1, position, -1.0)
        found.append(position)
    where = torch.cat(found, dim=1).sort(dim=1).values
    outliers = values.gather(1, where)
    if not bool((outliers.abs() <= int8.LIMIT).all()):
        floats.refuse_values(rows.cpu().numpy(), int8.LIMIT, "int8")
    values.scatter_(1, where, 0.0)
    sizes.scatter_(1, where, 0.0)

    amax = sizes.view(n, layout.blocks, int8.BLOCK).amax(dim=2)
    scales = ((amax / torch.full_like(amax, 127.0)).view(torch.int32) + 0xFFFF) >> 16
    divisors = (scales << 16).view(torch.float32)
    divisors = torch.maximum(divisors, torch.full_like(divisors, float(int8.SMALLEST_SCALE)))
    codes = (values.view(n, layout.blocks, int8.BLOCK) / divisors[:, :, None]).round().to(torch.int8)

    head = torch.cat([part.to(torch.int16) for part in (scales, where, _rounded_to_bf16(outliers))], dim=1)
    parts = torch.cat([head.view(torch.uint8), codes.view(n, -1)[:, :width].view(torch.uint8)], dim=1)
    coded: bytes = parts.cpu().numpy().tobytes()
    return coded


def decode_int8_on_device(raw: torch.Tensor, width: int) -> torch.Tensor:
    """``wire.int8.decode`` in torch's operators: uint8 [n, row_bytes] whose heads were checked, to float32 [n, width]."""
    n = len(raw)
    if n == 0:
        return torch.zeros((0, width), dtype=torch.float32, device=raw.device)
    layout = int8.layout(width)
    # clone, since contiguous() keeps the odd stride of a single row, which cannot be viewed as words
    head = raw[:, : layout.head_bytes].clone(memory_format=torch.contiguous_format).view(torch.int16).to(torch.int32)
    wide = (head << 16).view(torch.float32)
    codes = torch.zeros((n, layout.blocks * int8.BLOCK), dtype=torch.float32, device=raw.device)
    codes[:, :width] = raw[:, layout.head_bytes :].view(torch.int8)
    rows = codes.view(n, layout.blocks, int8.BLOCK) * wide[:, layout.factors, None]
    rows = rows.view(n, -1)[:, :width].contiguous()
    where = (head[:, layout.positions] & 0xFFFF).long()
    return rows.scatter_(1, where, wide[:, layout.outliers])


def encode_int4_on_device(rows: torch.Tensor) -> bytes:
    """``wire.int4.encode`` in torch's operators: float32 [n, width], on the device where it lies.

    Raises CodecError where a value is not finite or too large.
    """
    n, width = rows.shape
    if n == 0:
        return b""
    layout = int4.layout(width)
    values = torch.zeros((n, layout.padded), dtype=torch.float32, device=rows.device)
    values[:, :width] = rows
    if not bool((values.abs() <= int4.LIMIT).all()):
        floats.refuse_values(rows.cpu().numpy(), int4.LIMIT, "int4")
    # A stable order: of equal ones the first.
    where = values.abs().sort(dim=1, descending=True, stable=True).indices[:, : layout.kept].sort(dim=1).values
    outliers = values.gather(1, where)
    values.scatter_(1, where, 0.0)

    blocks = values.view(n, int4.BLOCK, layout.blocks)
    highest, amax = blocks.amax(dim=1), blocks.abs().amax(dim=1)
    per_row = amax.amax(dim=1, keepdim=True)
    step_bits = ((per_row / torch.full_like(per_row, float(int4.STEPS_PER_MAX))).view(torch.int32) + 0xFFFF >> 16).clamp(min=1)
    step = (step_bits << 16).view(torch.float32)
    steps = (amax / (step * 8)).ceil().clamp(max=127)
    steps = torch.where(highest == amax, -steps, steps)
    scales = steps * step
    divisors = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = ((blocks / divisors[:, None]).round().clamp(max=7) + 8).to(torch.uint8)

    half = int4.BLOCK // 2
    pairs = codes[:, :half] + codes[:, half:] * 16
    head = torch.cat([part.to(torch.int16) for part in (step_bits, where, _rounded_to_bf16(outliers))], dim=1)
    parts = torch.cat([head.view(torch.uint8), steps.to(torch.int8).view(torch.uint8), pairs.view(n, -1)], dim=1)
    coded: bytes = parts.cpu().numpy().tobytes()
    return coded


def decode_int4_on_device(raw: torch.Tensor, width: int) -> torch.Tensor:
    """``wire.int4.decode`` in torch's operators: uint8 [n, row_bytes] whose heads were checked, to float32 [n, width]."""
    n = len(raw)
    if n == 0:
        return torch.zeros((0, width), dtype=torch.float32, device=raw.device)
    layout = int4.layout(width)
    head = raw[:, : layout.head_bytes].clone(memory_format=torch.contiguous_format).view(torch.int16).to(torch.int32)
    wide = (head << 16).view(torch.float32)
    scales = raw[:, layout.scales].view(torch.int8) * wide[:, :1]
    pairs = raw[:, layout.codes]
    codes = torch.cat([pairs & 15, pairs >> 4], dim=1).float() - 8
    rows = (codes.view(n, int4.BLOCK, layout.blocks) * scales[:, None]).view(n, -1)
    where = (head[:, layout.positions] & 0xFFFF).long()
    return rows.scatter_(1, where, wide[:, layout.outliers])[:, :width].contiguous()


def _rounded_to_bf16(values: torch.Tensor) -> torch.Tensor:
    """Bits of the nearest bfloat16, ties to even, as int32."""
    bits = values.view(torch.int32)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@dataclass(frozen=True)
class DeviceCodec:
    """A codec in torch's operators: ``decode`` takes rows whose heads ``refuse_heads`` has let pass on the CPU."""

    encode: Callable[[torch.Tensor], bytes]
    decode: Callable[[torch.Tensor, int], torch.Tensor]
    refuse_heads: Callable[[Bytes, int], None]


ON_DEVICE = {
    "int8": DeviceCodec(encode_int8_on_device, decode_int8_on_device, int8.refuse_heads),
    "int4": DeviceCodec(encode_int4_on_device, decode_int4_on_device, int4.refuse_heads),
}

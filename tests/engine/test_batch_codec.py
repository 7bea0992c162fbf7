"""Coding rows of several sessions together is coding each alone, and a fault stays with whose it is."""

from __future__ import annotations

import torch

from farflung.core.errors import CodecError, MalformedFrame
from farflung.engine import codec
from farflung.engine.batch_codec import decode_each, encode_each

WIDTH = 200
NAMES = ["int8", "fp32", "int8", "bf16", "int8"]
ROWS = [torch.randn((count, WIDTH), generator=torch.Generator().manual_seed(count)) for count in (1, 3, 2, 1, 5)]


def test_together_the_bytes_are_those_of_each_alone() -> None:
    assert encode_each(NAMES, ROWS) == [codec.encode(name, rows) for name, rows in zip(NAMES, ROWS, strict=True)]


def test_together_the_rows_are_those_of_each_alone() -> None:
    buffers = [codec.encode(name, rows) for name, rows in zip(NAMES, ROWS, strict=True)]
    found = decode_each(NAMES, buffers, [len(rows) for rows in ROWS], WIDTH, torch.float32)
    for rows, name, buffer in zip(found, NAMES, buffers, strict=True):
        assert isinstance(rows, torch.Tensor)
        assert torch.equal(rows, codec.decode(name, buffer, WIDTH))


def test_a_fault_is_that_of_one_session_alone() -> None:
    spoilt = [rows.clone() for rows in ROWS]
    spoilt[2][1, 7] = torch.nan
    coded = encode_each(NAMES, spoilt)
    assert [isinstance(found, CodecError) for found in coded] == [False, False, True, False, False]

    buffers = [codec.encode(name, rows) for name, rows in zip(NAMES, ROWS, strict=True)]
    counts = [len(rows) for rows in ROWS]
    buffers[0] = b"\xff" * len(buffers[0])  # scales and outliers that no encoder writes
    buffers[1] = buffers[1][:-1]
    counts[4] += 1
    decoded = decode_each(NAMES, buffers, counts, WIDTH, torch.float32)
    assert [type(found) for found in decoded] == [CodecError, CodecError, torch.Tensor, torch.Tensor, MalformedFrame]

"""Coded rows of several sessions at once: one call per codec of a step instead of one per session.

Coded rows have a fixed size and do not depend on each other, so that joined buffers decode to joined rows. Where a joint call
fails, each session is tried alone and only its own fault is its error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import TypeVar

import torch

from farflung.core.errors import FarflungError, MalformedFrame
from farflung.engine import codec
from farflung.wire.codec import codec as codec_named
from farflung.wire.frame import Buffer

S = TypeVar("S")
T = TypeVar("T")


def decode_each(
    names: Sequence[str], buffers: Sequence[Buffer], counts: Sequence[int], width: int, dtype: torch.dtype
) -> list[torch.Tensor | FarflungError]:
    """The rows [count, width] in each buffer, or why there are none.

    Args:
        names: the codec of each buffer.
        buffers: coded rows.
        counts: how many rows each is to hold; another number is a MalformedFrame.
        width: values of a row.
        dtype: of the rows.
    """
    found: list[torch.Tensor | FarflungError | None] = [None] * len(names)
    groups: dict[str, list[int]] = {}
    for index, (name, buffer, count) in enumerate(zip(names, buffers, counts, strict=True)):
        try:
            rows = codec_named(name).rows_in(memoryview(buffer).nbytes, width)
            if rows != count:
                raise MalformedFrame(f"{count} slots came with {rows} rows of activations")
        except FarflungError as error:
            found[index] = error
        else:
            groups.setdefault(name, []).append(index)
    for name, members in groups.items():
        given = [(buffers[index], counts[index]) for index in members]
        results = _together_or_each(partial(_decode, name, width, dtype), given)
        for index, result in zip(members, results, strict=True):
            found[index] = result
    return [result for result in found if result is not None]


def encode_each(names: Sequence[str], rows: Sequence[torch.Tensor]) -> list[bytes | FarflungError]:
    """The coded bytes of each [n, width], or why they cannot be coded. ``names``: the codec of each."""
    found: list[bytes | FarflungError | None] = [None] * len(names)
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    for name, members in groups.items():
        for index, result in zip(
            members, _together_or_each(partial(_encode, name), [rows[index] for index in members]), strict=True
        ):
            found[index] = result
    return [result for result in found if result is not None]


def _decode(name: str, width: int, dtype: torch.dtype, given: Sequence[tuple[Buffer, int]]) -> Sequence[torch.Tensor]:
    joined = given[0][0] if len(given) == 1 else b"".join([buffer for buffer, _ in given])
    parts: Sequence[torch.Tensor] = codec.decode(name, joined, width, dtype=dtype).split([count for _, count in given])
    return parts


def _encode(name: str, rows: Sequence[torch.Tensor]) -> Sequence[bytes]:
    if len(rows) == 1:
        return [codec.encode(name, rows[0])]
    coded = codec.encode(name, torch.cat([*rows]))
    row_bytes = codec_named(name).row_bytes(rows[0].shape[1])
    bounds = accumulate((len(some) * row_bytes for some in rows), initial=0)
    return [coded[start:stop] for start, stop in pairwise(bounds)]


def _together_or_each(call: Callable[[Sequence[S]], Sequence[T]], given: Sequence[S]) -> list[T | FarflungError]:
    try:
        return [*call(given)]
    except FarflungError as error:
        if len(given) == 1:
            return [error]
    return [result for one in given for result in _together_or_each(call, [one])]

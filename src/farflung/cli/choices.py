"""Options whose values are words: which there are, and what the words mean."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from farflung.core.errors import UsageError
from farflung.core.model import LayerRange

CODECS = ("fp32", "bf16", "int8", "int4")
"""Those of ``wire.codec``, the coarsest last."""


DTYPES = ("auto", "fp32", "bf16", "int8", "int4")


def check_dtype(dtype: str) -> None:
    """Raises UsageError for a precision that does not exist."""
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is unknown", hint=f"use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")


class Part(NamedTuple):
    """The ``number``-th of ``of`` parts of a model, from 1, as equal as whole layers allow."""

    number: int
    of: int

    def layers(self, count: int) -> LayerRange:
        """Of a model with ``count`` layers. Raises UsageError where there are more parts than layers."""
        if self.of > count:
            raise UsageError(f"{count} layers cannot be cut into {self.of} parts", hint=f"use at most {count} parts")
        return LayerRange((self.number - 1) * count // self.of, self.number * count // self.of)


def parse_layers(text: str) -> LayerRange | Part | None:
    """``A:B``, ``K/N`` or ``auto`` (None). Raises UsageError for what can be no layers of any model."""
    if text == "auto":
        return None
    if "/" not in text:
        return LayerRange.parse(text)
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--layers {text!r} is no part of a model", hint="write K/N with 1 <= K <= N, e.g. 2/3")
    return Part(int(match[1]), int(match[2]))


def parse_codecs(text: str) -> tuple[str, ...]:
    """The codecs of ``int8`` or ``int8,int4``, in that order. Raises UsageError for one that does not exist or comes twice."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in CODECS:
            raise UsageError(f"--codec {text[:80]!r}: {name[:20]!r} is unknown", hint=f"use one or more of {', '.join(CODECS)}")
    if len(set(names)) < len(names):
        raise UsageError(f"--codec {text[:80]!r} names a codec twice", hint="the order is that of preference")
    return names


def offered_codecs(names: tuple[str, ...]) -> frozenset[str]:
    """What a node takes that was told ``names``: these and all finer ones, which every driver may count on."""
    return frozenset(CODECS[: 1 + max(map(CODECS.index, names))])


def check_speculation(wanted: str) -> None:
    """Raises UsageError for kinds of speculation that do not exist (yet)."""
    if wanted in ("ngram", "draft"):
        raise UsageError(f"--speculate {wanted} is not built yet", hint="use --speculate off, or leave the option out")
    if wanted not in ("auto", "off"):
        raise UsageError(f"--speculate {wanted!r} is unknown", hint="use auto or off")


def torch_dtype(name: str) -> Any:
    """The torch dtype of a checked name, of activations and of weights that are not quantised; ``auto`` is bf16 where this
    processor multiplies it natively, else fp32."""
    import torch

    if name == "auto":
        name = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    return torch.float32 if name == "fp32" else torch.bfloat16


def quantised(name: str) -> Literal["int8", "int4"] | None:
    """What a checked name rounds weights to while loading; None: nothing."""
    if name == "int8":
        return "int8"
    return "int4" if name == "int4" else None

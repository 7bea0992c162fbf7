"""What a model is, as far as a swarm needs to know it."""

from __future__ import annotations

import re

from msgspec import Struct

from farflung.core.errors import UsageError
from farflung.core.ids import ModelDigest


class LayerRange(Struct, frozen=True, order=True, array_like=True):
    """Decoder layers ``start <= i < stop`` of a model."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise UsageError(f"layers {self.start}:{self.stop} are no range", hint="write A:B with 0 <= A < B, e.g. 0:6")

    @classmethod
    def parse(cls, text: str) -> LayerRange:
        """``"A:B"`` to a range. Raises UsageError."""
        match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip())
        if not match:
            raise UsageError(f"{text!r} is no layer range", hint="write A:B, e.g. 0:6 for the first six layers")
        return cls(int(match[1]), int(match[2]))

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.start <= layer < self.stop

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


class ModelSpec(Struct, frozen=True, kw_only=True):
    """The shape of one model.

    Attributes:
        name: what people call it (hub id, file stem or a name of ``farflung models list``).
        family: the ``model_type`` of transformers, e.g. ``qwen2``.
        digest: see ``ModelDigest``.
        layers: number of decoder layers.
        hidden_size: width of the activations between layers, in values.
        vocab_size: number of logits of the head.
        context_tokens: positions the model was made for.
        eos_token_ids: tokens that end a text.
    """

    name: str
    family: str
    digest: ModelDigest
    layers: int
    hidden_size: int
    vocab_size: int
    context_tokens: int
    eos_token_ids: tuple[int, ...] = ()

    @property
    def all_layers(self) -> LayerRange:
        return LayerRange(0, self.layers)

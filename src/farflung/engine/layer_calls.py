"""A family's own way of calling its layers, as data: recorded once by ``recipe``, repeated for every pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from farflung.engine.attention import StepAttention
from farflung.engine.kv_tensors import KvShape

_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary scaling whose factors transformers chooses in every call, from the longest position in it."""


@dataclass(frozen=True)
class FromRotary:
    """Stands in recorded arguments for what a rotary call made: its ``part``-th tensor, or all of it."""

    call: int
    part: int | None = None


@dataclass(frozen=True)
class RotaryCall:
    """A rotary module and what it is given beside hidden states and positions (the kind of layer, in some families)."""

    module: nn.Module
    extra: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]
    keyword: bool
    """Whether positions go in by name."""

    @property
    def by_length(self) -> bool:
        """Whether its factors depend on how long a session is."""
        return any(kind in _BY_LENGTH for kind in rope_kinds(self.module))

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor, contexts: torch.Tensor | None = None) -> Any:
        """``contexts``: int64 [rows], the length of each row's session, which fixes the factors for as long as it lives;
        None leaves them to transformers."""
        if contexts is None or not self.by_length:
            return self._call(hidden, positions)
        lengths = contexts.unique().tolist()
        if len(lengths) == 1:
            return self._of_length(hidden, positions, lengths[0])
        found: list[torch.Tensor] = []
        for length in lengths:
            chosen = (contexts == length).nonzero()[:, 0]
            made = self._of_length(hidden, positions[:, chosen], length)
            parts = made if isinstance(made, tuple) else (made,)
            found = found or [part.new_empty((part.shape[0], positions.shape[1], *part.shape[2:])) for part in parts]
            for whole, part in zip(found, parts, strict=True):
                whole[:, chosen] = part
        return tuple(found) if isinstance(made, tuple) else found[0]

    def _of_length(self, hidden: torch.Tensor, positions: torch.Tensor, length: int) -> Any:
        """One more row at the session's last position makes transformers choose as for the whole session.

        A row that lies beyond the length its session declared is rotated as the last one: transformers chooses by the
        largest position of all, and the other sessions of that length are not to feel it.
        """
        last = length - 1
        for name in vars(self.module):
            if name.endswith("max_seq_len_cached"):
                setattr(self.module, name, 0)  # else the longest session so far would decide
        made = self._call(hidden, torch.cat([positions.clamp(max=last), positions.new_tensor([[last]])], 1))
        return tuple(part[:, :-1] for part in made) if isinstance(made, tuple) else made[:, :-1]

    def _call(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        if self.keyword:
            return self.module(hidden, *self.extra, position_ids=positions, **dict(self.named))
        return self.module(hidden, positions, *self.extra, **dict(self.named))


@dataclass(frozen=True)
class LayerCall:
    """One layer, and its arguments by name, with ``FromRotary`` where a rotary call's result belongs.

    Attributes:
        past: the argument that holds a cache, where the layer asks it how many tokens came before; None: it does not ask.
    """

    layer: nn.Module
    arguments: dict[str, Any]
    past: str | None = None

    @cached_property
    def _changing(self) -> tuple[str, ...]:
        """The arguments that are not the same in every pass."""
        return tuple(name for name, value in self.arguments.items() if _has_rotary(value))

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor, attention: Any, embeddings: list[Any]) -> torch.Tensor:
        """[1, rows, width] to [1, rows, width]. ``attention`` reaches our attention function as it is."""
        arguments = dict(self.arguments)
        for name in self._changing:
            arguments[name] = _filled(arguments[name], embeddings)
        if self.past is not None:
            arguments[self.past] = PastOfRows(positions)
        out = self.layer(hidden, position_ids=positions, farflung=attention, **arguments)
        return out if isinstance(out, torch.Tensor) else out[0]


class PastOfRows:
    """A cache to layers that count: row i is told so many tokens before the pass that i more make its own position."""

    def __init__(self, positions: torch.Tensor) -> None:
        self._before = positions[0] - torch.arange(positions.shape[1])

    def get_seq_length(self, *_: Any) -> torch.Tensor:
        return self._before

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Ours are kept where attention is called."""
        return key, value


@dataclass(frozen=True)
class Recipe:
    """Repeats a stage's forward.

    Attributes:
        entry: token ids and positions, both int64 [1, rows], to activations; first stage only.
        rotaries: the distinct rotary calls of a forward.
        layers: in order.
        shapes: of keys and values, by the layer's own index.
        exit: activations [1, rows, width] to logits, final norm included; last stage only.
        limit: positions up to which the stage is exact; None: the model's whole context.
    """

    entry: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    rotaries: tuple[RotaryCall, ...]
    layers: tuple[LayerCall, ...]
    shapes: dict[int, KvShape]
    exit: Callable[[torch.Tensor], torch.Tensor] | None
    limit: int | None = None

    @property
    def by_length(self) -> bool:
        """Whether ``run_layers`` must be told how long sessions are."""
        return any(rotary.by_length for rotary in self.rotaries)

    def run_layers(
        self, hidden: torch.Tensor, positions: torch.Tensor, attention: StepAttention, contexts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[1, rows, width] through all layers of the stage. ``contexts``: int64 [rows], see ``RotaryCall``."""
        embeddings = [rotary(hidden, positions, contexts) for rotary in self.rotaries]
        for call in self.layers:
            hidden = call(hidden, positions, attention, embeddings)
        return hidden


def rope_kinds(module: nn.Module) -> set[str]:
    """The kinds of scaling of a rotary module; empty for another module."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return {str(kind) for kind in kinds.values()}
    return set() if kinds is None else {str(kinds)}


def _has_rotary(value: Any) -> bool:
    if isinstance(value, (tuple, dict)):
        return any(_has_rotary(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, FromRotary)


def _filled(value: Any, embeddings: list[Any]) -> Any:
    if isinstance(value, FromRotary):
        made = embeddings[value.call]
        return made if value.part is None else made[value.part]
    if isinstance(value, tuple):
        return tuple(_filled(item, embeddings) for item in value)
    if isinstance(value, dict):
        return {key: _filled(item, embeddings) for key, item in value.items()}
    return value

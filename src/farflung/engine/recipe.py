"""How a family calls its own layers, learnt by watching one tiny forward of the model itself.

transformers' forward of a text model builds masks, caches and outputs around a loop over layers; for a stage only the loop is
wanted. Which rotary embedding a layer gets, and which other arguments, differs by family and version, so it is recorded once
at load and then repeated without the rest. What cannot be repeated is refused by name (UnsupportedModel).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from farflung.core.errors import UnsupportedModel
from farflung.engine.attention import ATTENTION, ProbeAttention, StepAttention
from farflung.engine.kv_tensors import KvShape
from farflung.engine.loader import StageModule

_PROBE_ROWS = 3
_POSITION_DEPENDENT = {"dynamic", "longrope"}  # factors chosen from the longest position of a call, whichever session it is of

Embedding = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class RotaryCall:
    """A rotary module and what it is given beside hidden states and positions (the kind of layer, in some families)."""

    module: nn.Module
    extra: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor) -> Embedding:
        result: Embedding = self.module(hidden, positions, *self.extra, **dict(self.named))
        return result


@dataclass(frozen=True)
class LayerCall:
    """One layer, and its arguments: constants, and which rotary call fills which keyword."""

    layer: nn.Module
    constants: dict[str, Any]
    rotary: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Recipe:
    """Repeats a stage's forward.

    Attributes:
        entry: token ids and positions, both int64 [1, rows], to activations; first stage only.
        rotaries: the distinct rotary calls of a forward.
        layers: in order.
        shapes: of keys and values, by the layer's own index.
        exit: activations [1, rows, width] to logits, final norm included; last stage only.
    """

    entry: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    rotaries: tuple[RotaryCall, ...]
    layers: tuple[LayerCall, ...]
    shapes: dict[int, KvShape]
    exit: Callable[[torch.Tensor], torch.Tensor] | None

    def run_layers(self, hidden: torch.Tensor, positions: torch.Tensor, attention: StepAttention) -> torch.Tensor:
        """[1, rows, width] through all layers of the stage."""
        embeddings = [rotary(hidden, positions) for rotary in self.rotaries]
        for call in self.layers:
            rotary = {name: embeddings[index] for name, index in call.rotary}
            out = call.layer(hidden, position_ids=positions, farflung=attention, **rotary, **call.constants)
            hidden = out if isinstance(out, torch.Tensor) else out[0]
        return hidden


def learn_recipe(stage: StageModule) -> Recipe:
    """Watches one forward of ``stage``. Its attention becomes ours. Raises UnsupportedModel."""
    _check_rotary(stage)
    for module in stage.model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = ATTENTION
    width = stage.config.hidden_size
    positions = torch.arange(_PROBE_ROWS)[None]
    ids = positions.clone()
    probe = ProbeAttention()
    recorder = _Recorder(stage)
    start = {"input_ids": ids} if stage.is_first else {"inputs_embeds": torch.zeros((1, _PROBE_ROWS, width), dtype=stage.dtype)}
    with torch.inference_mode(), recorder:
        stage.base(**start, position_ids=positions, use_cache=False, farflung=probe)
    missing = [layer for layer in range(stage.layer_range.start, stage.layer_range.stop) if layer not in probe.shapes]
    if missing or len(recorder.layers) != len(stage.layers):
        raise UnsupportedModel(
            f"family {stage.config.model_type!r} cannot be run here: layers {missing} "
            "do not use transformers' attention interface"
        )
    entry = None if stage.embed is None else _entry(stage, stage.embed, ids, recorder.first_input)
    exit_ = _Exit(stage) if stage.is_last else None
    return Recipe(entry, tuple(recorder.rotaries), tuple(recorder.layers), probe.shapes, exit_)


class _Recorder:
    """Hooks on rotary modules and layers for the length of a ``with``."""

    def __init__(self, stage: StageModule) -> None:
        self._stage = stage
        self._handles: list[Any] = []
        self._made: dict[int, int] = {}  # id of a rotary output's first tensor -> index of the call
        self._kept: list[Any] = []  # keeps those ids alive
        self.rotaries: list[RotaryCall] = []
        self.layers: list[LayerCall] = []
        self.first_input: torch.Tensor | None = None

    def __enter__(self) -> None:
        for module in self._stage.rotary:
            self._handles.append(module.register_forward_hook(self._on_rotary, with_kwargs=True))
        for layer in self._stage.layers:
            self._handles.append(layer.register_forward_pre_hook(self._on_layer, with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        named = tuple((key, value) for key, value in kwargs.items() if key not in ("x", "position_ids"))
        extra = tuple(value for value in args if not isinstance(value, torch.Tensor))
        self._made[id(output[0])] = len(self.rotaries)
        self._kept.append(output)
        self.rotaries.append(RotaryCall(module, extra, named))

    def _on_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.first_input is None:
            self.first_input = args[0] if args else kwargs["hidden_states"]
        rotary: list[tuple[str, int]] = []
        constants: dict[str, Any] = {}
        for key, value in kwargs.items():
            if key in ("hidden_states", "position_ids", "farflung"):
                continue
            if isinstance(value, tuple) and value and id(value[0]) in self._made:
                rotary.append((key, self._made[id(value[0])]))
            elif value is None or isinstance(value, (bool, int, float, str)):
                constants[key] = value
            else:
                raise UnsupportedModel(
                    f"family {self._stage.config.model_type!r} cannot be split: its layers are handed {key!r} "
                    f"({type(value).__name__}), which belongs to no single stage"
                )
        self.layers.append(LayerCall(layer, constants, tuple(rotary)))


def _check_rotary(stage: StageModule) -> None:
    for module in stage.rotary:
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if kinds & _POSITION_DEPENDENT:
            raise UnsupportedModel(
                f"{stage.config.model_type!r} with {', '.join(sorted(kinds & _POSITION_DEPENDENT))} rotary scaling is not run "
                "here: transformers chooses its factors anew in every call, from the longest session of the batch",
                hint="use the model's plain configuration, without long-context scaling",
            )


def _entry(
    stage: StageModule, embed: nn.Module, ids: torch.Tensor, seen: torch.Tensor | None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The embedding module alone where that is all the model does before its first layer, else the model without layers."""
    with torch.inference_mode():
        plain = embed(ids)
    if seen is not None and plain.shape == seen.shape and torch.equal(plain, seen):
        return lambda ids, _: embed(ids)
    base = _shallow(stage.base)
    for name, child in stage.base.named_children():
        if child is stage.layers:
            setattr(base, name, nn.ModuleList())
        elif child is stage.norm or isinstance(child, nn.Identity):
            setattr(base, name, nn.Identity())

    def without_layers(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = base(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return out

    return without_layers


class _Exit:
    """Final norm and head, by the causal model's own forward (which scales or caps logits in some families)."""

    def __init__(self, stage: StageModule) -> None:
        self._model = _shallow(stage.model)
        setattr(self._model, stage.model.base_model_prefix, _JustNorm(stage.norm))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits
        return logits


class _JustNorm(nn.Module):  # type: ignore[misc]
    """Stands where the text model was."""

    def __init__(self, norm: nn.Module | None) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.norm(inputs_embeds))


def _shallow(module: nn.Module) -> nn.Module:
    """The same module with a table of children of its own, so that one can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin

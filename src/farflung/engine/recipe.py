"""How a family calls its own layers, learnt by watching one tiny forward of the model itself.

transformers' forward of a text model builds masks, caches and outputs around a loop over layers; for a stage only the loop is
wanted. Which rotary embedding a layer gets, and which other arguments, differs by family and version, so it is recorded once
at load and then repeated without the rest. What cannot be repeated is refused by name (UnsupportedModel), and what was recorded
is tried against transformers' own attention before it serves (``self_check``).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from farflung.core.errors import UnsupportedModel
from farflung.engine.attention import ATTENTION
from farflung.engine.layer_calls import FromRotary, LayerCall, Recipe, RotaryCall, rope_kinds
from farflung.engine.loader import StageModule
from farflung.engine.masks import MaskRule, Reach
from farflung.engine.probe import ProbeAttention, ProbeCache, check_finite, random_rows
from farflung.engine.self_check import self_check
from farflung.engine.skeleton import understood

_PROBE_ROWS = 3
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What layers call a cache, over families and versions of transformers."""


def learn_recipe(stage: StageModule) -> Recipe:
    """Watches one forward of ``stage`` and tries what it saw. Its attention becomes ours. Raises UnsupportedModel."""
    with _named(stage):
        recipe = _learn(stage)
        self_check(stage, recipe)
    return recipe


def learn_calls(stage: StageModule) -> Recipe:
    """The same without trying it, for a stage without weights of its own."""
    with _named(stage):
        return _learn(stage)


@contextmanager
def _named(stage: StageModule) -> Iterator[None]:
    try:
        yield
    except UnsupportedModel as error:
        family = stage.config.model_type
        raise UnsupportedModel(f"family {family!r} cannot be split: {error.message}", hint=error.hint) from error


def _learn(stage: StageModule) -> Recipe:
    for module in stage.model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = ATTENTION
    ids, positions = torch.arange(_PROBE_ROWS)[None], torch.arange(_PROBE_ROWS)[None]
    context = context_of(stage)
    probe = ProbeAttention(_PROBE_ROWS, context)
    recorder = _Recorder(stage, probe)
    start = {"input_ids": ids} if stage.is_first else {"inputs_embeds": random_rows(stage, _PROBE_ROWS)}
    try:
        with torch.inference_mode(), recorder, understood("a stage"):
            out = stage.base(**start, position_ids=positions, use_cache=False, farflung=probe).last_hidden_state
    except UnsupportedModel:
        recorder.refuse_state()  # says more than what failed because of it
        raise
    recorder.refuse_state()
    recorder.refuse_between(out)
    missing = [layer for layer in range(stage.layer_range.start, stage.layer_range.stop) if layer not in probe.shapes]
    if missing or len(recorder.layers) != len(stage.layers):
        raise UnsupportedModel(f"its layers {missing} do not use transformers' attention interface")
    _check_rotary(stage, recorder.rotaries)
    entry = None if stage.embed is None else _entry(stage, stage.embed, ids, recorder.first_input)
    exit_ = _Exit(stage) if stage.is_last else None
    limits = [reach.limit for reach in probe.reach.values() if reach.limit is not None]
    calls = tuple(
        _with_window(call, index, probe, context) for index, call in enumerate(recorder.layers, stage.layer_range.start)
    )
    return Recipe(entry, tuple(recorder.rotaries), calls, probe.shapes, exit_, min(limits, default=None))


def context_of(stage: StageModule) -> int:
    """Positions the model was made for, as far as masks are tried."""
    found = getattr(stage.config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else 2**15


def _with_window(call: LayerCall, layer: int, probe: ProbeAttention, context: int) -> LayerCall:
    """Attention goes by the window that the layer names; where only the mask has one, the layer is handed its width."""
    reach, named = probe.reach[layer], probe.windows[layer]
    if reach.window == named or reach == Reach(limit=named) or (reach == Reach() and named is not None and named >= context):
        return call
    if named is None:
        return LayerCall(call.layer, {**call.arguments, "sliding_window": reach.window}, call.past)
    raise UnsupportedModel(f"its layer {layer} names a window of {named} positions and masks {reach.window or 'none'}")


class _Recorder:
    """Hooks on rotary modules and layers for the length of a ``with``."""

    def __init__(self, stage: StageModule, probe: ProbeAttention) -> None:
        self._stage = stage
        self._probe = probe
        self._handles: list[Any] = []
        self._made: dict[int, FromRotary] = {}  # id of what a rotary call made, or of one of its tensors
        self._kept: list[Any] = []  # keeps those ids alive
        self._cache = ProbeCache()
        self._last: torch.Tensor | None = None
        self._ends = 0
        self.rotaries: list[RotaryCall] = []
        self.used: set[int] = set()
        self.layers: list[LayerCall] = []
        self.first_input: torch.Tensor | None = None

    def __enter__(self) -> None:
        for module in (inner for outer in self._stage.rotary for inner in outer.modules()):
            self._handles.append(module.register_forward_hook(self._on_rotary, with_kwargs=True))
        self._handles.append(self._stage.end.register_forward_hook(self._on_end))
        for layer in self._stage.layers:
            self._handles.append(layer.register_forward_pre_hook(self._on_layer, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._on_output))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def refuse_state(self) -> None:
        """Raises UnsupportedModel where layers keep more than keys and values."""
        if touched := sorted(self._cache.touched):
            raise UnsupportedModel(f"its layers keep state from token to token beside keys and values ({', '.join(touched)})")

    def refuse_between(self, out: torch.Tensor) -> None:
        """Raises UnsupportedModel where something is done to activations after the layers, other than the final norm."""
        if self._last is None:
            raise UnsupportedModel("its forward calls none of its layers")
        with torch.inference_mode():
            expected = self._last if self._stage.norm is None else self._stage.norm(self._last)
        if self._ends != 1 or expected.shape != out.shape or not torch.equal(expected, out):
            raise UnsupportedModel(
                f"it does more between layers and head than one final norm (which it calls {self._ends} times)"
            )

    def _on_end(self, *_: Any) -> None:
        self._ends += 1

    def _on_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not any(isinstance(value, torch.Tensor) and value.dtype == torch.int64 for value in (*args, *kwargs.values())):
            return  # no positions: a dropout, say
        named = tuple((key, value) for key, value in kwargs.items() if key not in ("x", "position_ids"))
        extra = tuple(value for value in args if not isinstance(value, torch.Tensor))
        index = len(self.rotaries)
        self._made[id(output)] = FromRotary(index)
        if isinstance(output, tuple):
            self._made.update((id(part), FromRotary(index, place)) for place, part in enumerate(output))
        self._kept.append(output)
        self.rotaries.append(RotaryCall(module, extra, named, "position_ids" in kwargs))

    def _on_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = list(inspect.signature(layer.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = given.pop(names[0])
        self._check_input(hidden)
        self._probe.layer = self._stage.layer_range.start + len(self.layers)
        arguments = {key: self._constant(key, value) for key, value in given.items() if key not in ("position_ids", "farflung")}
        cache = next((name for name in _CACHES if name in names), None)
        self.layers.append(LayerCall(layer, arguments))
        if cache is None:
            return (hidden,), given
        arguments[cache] = None
        self._cache.counted = False
        return (hidden,), {**given, cache: self._cache}

    def _on_output(self, layer: nn.Module, _: Any, output: Any) -> None:
        self._last = output if isinstance(output, torch.Tensor) else output[0]
        check_finite(self._last, self._probe.layer)
        if self._cache.counted:
            call = self.layers[-1]
            past = next(name for name in _CACHES if name in call.arguments)
            self.layers[-1] = LayerCall(layer, call.arguments, past)
        self._cache.counted = False

    def _check_input(self, hidden: Any) -> None:
        width = self._stage.config.hidden_size
        if not isinstance(hidden, torch.Tensor) or hidden.shape != (1, _PROBE_ROWS, width):
            shape = list(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
            raise UnsupportedModel(f"its layers take {shape} where one row of {width} values per token travels")
        if self.first_input is None:
            self.first_input = hidden
        elif self._last is None or not torch.equal(self._last, hidden):
            raise UnsupportedModel("it changes activations between two layers")

    def _constant(self, key: str, value: Any) -> Any:
        """The argument as it is repeated. Raises UnsupportedModel where it belongs to one forward only."""
        if id(value) in self._made:
            self.used.add(self._made[id(value)].call)
            return self._made[id(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, tuple):
            return tuple(self._constant(key, item) for item in value)
        if isinstance(value, dict) and value:
            return {name: self._constant(key, item) for name, item in value.items()}
        if isinstance(value, MaskRule):
            return None
        raise UnsupportedModel(f"its layers are handed {key!r} ({type(value).__name__}), which belongs to no single stage")


def _check_rotary(stage: StageModule, calls: list[RotaryCall]) -> None:
    """Factors that depend on length are fixed per session for the modules that were seen; elsewhere they are refused."""
    fixed = {id(call.module) for call in calls}
    for module in stage.model.modules():
        if id(module) not in fixed and module not in stage.rotary and rope_kinds(module) & {"dynamic", "longrope"}:
            raise UnsupportedModel("its layers choose rotary factors by themselves, in every call anew")


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
        (place,) = [name for name, child in stage.model.named_children() if child is stage.base]
        setattr(self._model, place, _JustNorm(stage.norm))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits
        return logits


class _JustNorm(nn.Module):  # type: ignore[misc]
    """Stands where the text model was."""

    def __init__(self, norm: nn.Module | None) -> None:
        super().__init__()
        self.norm = norm or nn.Identity()

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self.norm(inputs_embeds))


def _shallow(module: nn.Module) -> nn.Module:
    """The same module with a table of children of its own, so that one can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin

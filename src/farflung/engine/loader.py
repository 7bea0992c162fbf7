"""Loads one stage: the real ``transformers`` class with only its layers, filled tensor by tensor.

A stage reads and holds its own share: its layers, the embedding where it is the first, final norm and head where it is the last
(a tied head needs the embedding's tensor too). Peak memory is the stage plus one tensor; a parameter that is put together of
several (all experts of a layer, in most families that have them) is there up to three times while it is: as its parts, as what
they are stacked to, and as the whole.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from farflung.core.errors import CorruptWeights, UnsupportedModel, UsageError
from farflung.core.ids import ModelDigest
from farflung.core.model import LayerRange
from farflung.engine.attention import ATTENTION
from farflung.engine.manifest import ModelManifest
from farflung.engine.skeleton import Anatomy, Config, Skeleton, anatomy, build_skeleton, layer_count, slice_config
from farflung.engine.source import ModelSource, Progress, Stored

_HOLLOW = 0.01
"""Every weight of a hollow stage: small, so that nothing overflows however many are summed."""


@dataclass(frozen=True)
class StageModule:
    """A stage's modules, on the CPU, in inference mode. What the stage does not hold stays on the meta device.

    Attributes:
        model: the whole ``...ForCausalLM`` object; its text model has only this stage's layers.
        base: the text model. ``base(inputs_embeds=x, position_ids=p, use_cache=False)`` runs exactly this stage's layers, then
            the norm where it is the last stage (elsewhere ``base.norm`` is an identity).
        layers: the decoder layers held. Their ``layer_idx`` is the absolute one.
        rotary: ``base``'s modules without weights (rotary embeddings), with their buffers rebuilt.
        embed: first stage only.
        norm, head: last stage only.
        end: what stands at the place of the norm: the norm itself, or an identity.
        config: the whole model's configuration, held by the attention modules; ``base.config`` is a copy cut to these layers.
        layer_range: which layers.
        dtype: of the weights.
    """

    model: Any
    base: Any
    layers: nn.ModuleList
    rotary: tuple[nn.Module, ...]
    embed: nn.Module | None
    norm: nn.Module | None
    head: nn.Module | None
    end: nn.Module
    config: Config
    layer_range: LayerRange
    dtype: torch.dtype

    @property
    def is_first(self) -> bool:
        return self.embed is not None

    @property
    def is_last(self) -> bool:
        return self.head is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights held; a tied tensor counts once."""
        return sum(p.nbytes for p in self.model.parameters() if p.device.type != "meta")


Finish = Callable[[nn.Module, int | None], nn.Module]
"""Called with a layer and its index, or the head and None, when its parameters are there; what it returns takes its place."""


def stage_places(model: Skeleton, parts: Anatomy, layers: LayerRange) -> list[str]:
    """Names of the modules a stage holds, in the order they are filled: layers first."""
    held = [f"{parts.layers}.{index}" for index in range(layers.start, layers.stop)]
    if layers.start == 0:
        held.append(parts.embed)
    if layers.stop == layer_count(model.config):
        held += [parts.norm, parts.head]
    return held


def stage_parameters(model: Skeleton, parts: Anatomy, layers: LayerRange) -> dict[str, str]:
    """Parameters a stage holds, by name, and the parameter each takes its value from (itself, or the one it is tied to)."""
    tied = model.all_tied_weights_keys
    return {
        f"{place}.{name}": tied.get(f"{place}.{name}", f"{place}.{name}")
        for place in stage_places(model, parts, layers)
        for name in model.get_submodule(place).state_dict()
    }


def load_stage(
    source: ModelSource,
    layers: LayerRange,
    dtype: torch.dtype,
    *,
    attention: str | None = ATTENTION,
    progress: Progress | None = None,
    expected_digest: ModelDigest | None = None,
    finish: Finish | None = None,
) -> StageModule:
    """Builds and fills a stage.

    Args:
        source: an opened model.
        layers: which of its layers.
        dtype: of the weights, ``torch.float32`` or ``torch.bfloat16``.
        attention: name in transformers' attention interface, ours by default, which serves families that ``sdpa`` does not;
            None leaves the choice to transformers, for a stage that its own forward is to run.
        progress: told the bytes read.
        expected_digest: the model asked for. Given, the model must have it, and every tensor is checked against the manifest as
            it is read.
        finish: makes of a layer or head what the stage keeps, before the next is read: so that weights that are packed are not
            held twice.

    Raises UsageError where the model has no such layers; DigestMismatch; CorruptWeights, naming the tensor; UnsupportedModel.
    """
    config = source.config()
    count = layer_count(config)
    if layers.stop > count:
        raise UsageError(f"layers {layers} were asked for, but {source.name} has {count}", hint=f"use at most 0:{count}")
    manifest = None
    if expected_digest is not None:
        manifest = source.manifest(progress=progress)
        manifest.check_digest(expected_digest, source.name)
        for leaf in source.texts():
            manifest.check(leaf)
    model = build_skeleton(config, attention)
    parts = anatomy(model)
    values = stage_parameters(model, parts, layers)
    _fill_buffers(model, parts, layers)
    filling = _Filling(model, source, dtype, manifest, progress)
    filling.run(values, partial(_finish, model, parts, layers, finish) if finish is not None else None)
    return _cut(model, parts, layers, config, dtype)


def _finish(model: Skeleton, parts: Anatomy, layers: LayerRange, finish: Finish, name: str) -> None:
    """``name``: the parameter that was filled last. Hands over the layer or head whose last one it is."""
    place = next(place for place in stage_places(model, parts, layers) if name.startswith(f"{place}."))
    module = model.get_submodule(place)
    if place in (parts.embed, parts.norm) or f"{place}.{list(module.state_dict())[-1]}" != name:
        return
    index = None if place == parts.head else int(place.rpartition(".")[2])
    model.set_submodule(place, finish(module, index))


def hollow_stage(config: Config, layers: LayerRange) -> StageModule:
    """A stage at its real size whose weights are one value each, repeated without memory: for finding out how it is called.

    Raises UnsupportedModel.
    """
    config = copy.deepcopy(config)
    model = build_skeleton(config, ATTENTION)
    parts = anatomy(model)
    _fill_buffers(model, parts, layers)
    for module in model.modules():
        if type(module) is nn.Linear:  # whose kernel would copy the weight, as those of fused experts would
            module.forward = partial(_hollow_linear, module.out_features)
        elif isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() == 3:
            module.forward = partial(_hollow_linear, weight.shape[1])
        elif any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
            module.forward = _no_experts
    for name in stage_parameters(model, parts, layers):
        place, _, last = name.rpartition(".")
        module = model.get_submodule(place)
        empty = getattr(module, last)
        value = torch.full((), _HOLLOW, dtype=empty.dtype).expand(empty.shape)
        setattr(module, last, nn.Parameter(value, requires_grad=False) if isinstance(empty, nn.Parameter) else value)
    return _cut(model, parts, layers, config, torch.float32)


def _hollow_linear(outputs: int, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
    return (hidden.sum(-1, keepdim=True) * _HOLLOW).repeat_interleave(outputs, -1)


def _no_experts(hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros_like(hidden)


@dataclass(frozen=True)
class _Filling:
    """Reads parameters into a skeleton; against the manifest where there is one."""

    model: Skeleton
    source: ModelSource
    dtype: torch.dtype
    manifest: ModelManifest | None
    progress: Progress | None

    def run(self, values: dict[str, str], filled: Callable[[str], None] | None = None) -> None:
        """``values`` as ``stage_parameters`` gives them. A tensor that several parameters share is read once. ``filled`` is
        told the name of each parameter when it is there."""
        stored = self.source.tensors(self.model, {*values, *values.values()})
        values = {name: self._origin(name, origin, stored) for name, origin in values.items()}
        if missing := sorted(set(values.values()) - stored.keys()):
            raise UnsupportedModel(
                f"{self.source.name} has no tensor for {len(missing)} parameters of {type(self.model).__name__}, "
                f"the first is {missing[0]}",
                hint="its weights are named in a way that is not read here, or it is no causal language model",
            )
        total, done = sum(stored[origin].nbytes for origin in set(values.values())), 0
        uses = Counter(values.values())
        shared: dict[str, nn.Parameter | torch.Tensor] = {}
        for name, origin in values.items():
            value = shared.get(origin)
            if value is None:
                self._tell(done, total)
                value = self._read(origin, stored[origin])
                done += stored[origin].nbytes
                if uses[origin] > 1:
                    shared[origin] = value
            place, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(place), last, value)
            del value  # it may be packed and let go now
            if filled is not None:
                filled(name)
        self._tell(total, total)

    def _origin(self, name: str, origin: str, stored: Mapping[str, Stored]) -> str:
        """As transformers does: a parameter that the configuration ties but the file holds with other values is not tied."""
        if name == origin or name not in stored or origin not in stored:
            return origin
        return origin if _hashes(stored[name]) == _hashes(stored[origin]) else name

    def _read(self, name: str, stored: Stored) -> nn.Parameter | torch.Tensor:
        place, _, last = name.rpartition(".")
        empty = getattr(self.model.get_submodule(place), last)
        kept = any(part in self.model._keep_in_fp32_modules_strict for part in name.split("."))
        value = self.source.read(stored, torch.float32 if kept else self.dtype, against=self.manifest)
        if value.shape != empty.shape:
            raise CorruptWeights(
                f"tensor {stored.name!r} of {self.source.name} has shape {list(value.shape)}, "
                f"but the configuration makes it {list(empty.shape)}"
            )
        return nn.Parameter(value, requires_grad=False) if isinstance(empty, nn.Parameter) else value

    def _tell(self, done: int, total: int) -> None:
        if self.progress:
            self.progress("loading", done, total)


def _hashes(stored: Stored) -> list[str]:
    return [leaf.hash for leaf in stored.leaves()]


def _fill_buffers(model: Skeleton, parts: Anatomy, layers: LayerRange) -> None:
    """Gives values to buffers that no file holds (rotary frequencies, embedding scales), by the class's own initialisation.

    The parameters beside them are still on the meta device, where initialising does nothing.
    """
    held = [*parts.others, *(f"{parts.layers}.{index}" for index in range(layers.start, layers.stop))]
    if layers.start == 0:
        held.append(parts.embed)
    for place in held:
        for module in model.get_submodule(place).modules():
            if not module._non_persistent_buffers_set:
                continue
            for name in module._non_persistent_buffers_set:
                if (buffer := getattr(module, name)) is not None:
                    setattr(module, name, torch.empty_like(buffer, device="cpu"))
            with torch.no_grad():
                model._init_weights(module)


def _cut(model: Skeleton, parts: Anatomy, layers: LayerRange, config: Config, dtype: torch.dtype) -> StageModule:
    """Takes the layers of other stages out and leaves the rest of them on the meta device."""
    is_first, is_last = layers.start == 0, layers.stop == layer_count(config)
    base = model.get_submodule(parts.base)
    model.set_submodule(parts.layers, nn.ModuleList(list(model.get_submodule(parts.layers))[layers.start : layers.stop]))
    if not is_last:
        model.set_submodule(parts.norm, nn.Identity())
    base.config = copy.deepcopy(config)
    slice_config(base.config, layers.start, layers.stop)
    return StageModule(
        model=model,
        base=base,
        layers=model.get_submodule(parts.layers),
        rotary=tuple(model.get_submodule(name) for name in parts.others),
        embed=model.get_submodule(parts.embed) if is_first else None,
        norm=model.get_submodule(parts.norm) if is_last else None,
        head=model.get_submodule(parts.head) if is_last else None,
        end=model.get_submodule(parts.norm),
        config=config,
        layer_range=layers,
        dtype=dtype,
    )

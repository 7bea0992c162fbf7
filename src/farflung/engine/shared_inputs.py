"""Which linear maps of a layer are given the same activations, so that one multiplication can serve them all.

Query, key and value are, or gate and up; which ones and what they are called differs by family. So it is watched, on a stage at
its real size whose weights take no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from farflung.core.model import LayerRange
from farflung.engine.loader import hollow_stage
from farflung.engine.recipe import learn_calls
from farflung.engine.skeleton import Config


@dataclass(frozen=True)
class LinearMaps:
    """The ``nn.Linear`` of a stage.

    Attributes:
        groups: by layer, those that are given the same rows: names in the layer, in the order they are called. The members of a
            group have one parent.
        weights: values of all weights, the head's too.
    """

    groups: dict[int, tuple[tuple[str, ...], ...]]
    weights: int


def shared_inputs(config: Config, layers: LayerRange) -> LinearMaps:
    """Raises UnsupportedModel where the family cannot be split."""
    stage = hollow_stage(config, layers)
    names = {
        module: (index, name)
        for index, layer in enumerate(stage.layers, layers.start)
        for name, module in layer.named_modules()
        if type(module) is nn.Linear
    }
    seen: list[tuple[nn.Module, torch.Tensor]] = []  # holds the tensors, so that identities stay different

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append((module, given[0]))

    handles = [module.register_forward_pre_hook(note) for module in names]
    try:
        learn_calls(stage)
    finally:
        for handle in handles:
            handle.remove()
    by_input: dict[tuple[int, str, int], list[nn.Module]] = {}
    for module, given in seen:
        index, name = names[module]
        by_input.setdefault((index, name.rpartition(".")[0], id(given)), []).append(module)
    calls = [module for module, _ in seen]
    found: dict[int, list[tuple[str, ...]]] = {index: [] for index in range(layers.start, layers.stop)}
    for (index, _, _), members in by_input.items():
        if len(members) > 1 and all(calls.count(module) == 1 for module in members):
            found[index].append(tuple(names[module][1] for module in members))
    held = [*names, *(() if stage.head is None else (stage.head,))]
    return LinearMaps(
        {index: tuple(groups) for index, groups in found.items()},
        sum(module.in_features * module.out_features for module in held if type(module) is nn.Linear),
    )

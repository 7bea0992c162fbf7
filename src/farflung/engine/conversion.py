"""From the names in a checkpoint to the parameters of a model, by transformers' own rules, without reading anything.

Most parameters are stored as they are, some under an older name. Some are put together: transformers 5 keeps the experts of a
layer in one tensor where checkpoints have three small ones for each. Its rules (``conversion_mapping``) are applied to one
parameter at a time, so that a stage reads the experts of its own layers only.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from farflung.core.errors import UnsupportedModel
from farflung.engine.skeleton import Skeleton, understood
from farflung.engine.source import Assembled, Stored, StoredTensor


@dataclass(frozen=True)
class Origin:
    """Where a parameter comes from.

    Attributes:
        names: of the stored tensors, in the order that ``make`` takes them.
        make: the parameter from their values; None where the one stored tensor is the parameter.
    """

    names: tuple[str, ...]
    make: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None

    def stored(self, find: Callable[[str], StoredTensor]) -> Stored:
        """``find`` gives a stored tensor by name."""
        if self.make is None:
            return find(self.names[0])
        return Assembled(tuple(find(name) for name in self.names), self.make)


def parameter_origins(skeleton: Skeleton, stored: Collection[str], model: str) -> Mapping[str, Origin]:
    """Origin of every parameter of ``skeleton`` that ``stored`` tensors fill. ``model``: its name, for errors.

    Raises UnsupportedModel for a stored tensor without a place, and for two in one place.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(skeleton)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    expected = skeleton.state_dict()
    ignored = [re.compile(text) for text in (*(skeleton._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$")]
    prefix = skeleton.base_model_prefix
    found: dict[str, Origin] = {}
    groups: dict[str, list[tuple[str, str]]] = {}  # parameter -> (pattern, stored name)
    for name in sorted(stored, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if parameter not in expected:
            parameter, pattern = rename_source_key(name, [], [], prefix, expected)
        if parameter not in expected:
            if any(ignore.search(parameter) for ignore in ignored):
                continue
            raise UnsupportedModel(f"{model}: tensor {name!r} has no place in {type(skeleton).__name__}")
        if pattern is None:
            _refuse_second(found, parameter, name, model)
            found[parameter] = Origin((name,))
        else:
            groups.setdefault(parameter, []).append((pattern, name))
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    for parameter, group in groups.items():
        made = _converted(skeleton, rule_of[group[0][0]], parameter, group, expected)
        for target, origin in made.items():
            _refuse_second(found, target, origin.names[0], model)
        found |= made
    return found


def _refuse_second(found: Mapping[str, Origin], parameter: str, name: str, model: str) -> None:
    if parameter in found:
        raise UnsupportedModel(f"{model}: tensors {found[parameter].names[0]!r} and {name!r} are both its {parameter}")


def _converted(
    skeleton: Skeleton, rule: Any, first: str, group: list[tuple[str, str]], expected: Mapping[str, Any]
) -> dict[str, Origin]:
    """Origins of what ``rule`` makes of ``group``; ``first`` is the parameter named after its first target."""
    targets = [first.replace(rule.target_patterns[0], target, 1) for target in rule.target_patterns]
    patterns, names = tuple(pattern for pattern, _ in group), tuple(name for _, name in group)
    return {
        target: Origin(names, partial(_convert, _Making(skeleton, rule, first, target, patterns)))
        for target in targets
        if target in expected
    }


@dataclass(frozen=True)
class _Making:
    """``target`` is what is wanted of all that ``rule`` makes of values that match ``patterns``."""

    skeleton: Skeleton
    rule: Any
    first: str
    target: str
    patterns: tuple[str, ...]


def _convert(making: _Making, values: Sequence[torch.Tensor]) -> torch.Tensor:
    rule = copy.deepcopy(making.rule)
    for pattern, value in zip(making.patterns, values, strict=True):
        rule.collected_tensors[pattern].append(value)
    with understood(making.target):
        made = rule.convert(making.first, model=making.skeleton, config=making.skeleton.config)[making.target]
        result: torch.Tensor = made[0] if isinstance(made, list) else made
    return result.contiguous()

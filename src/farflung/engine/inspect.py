"""What a model is and costs, and whether it can be split: from its configuration alone, without its weights.

One layer of each kind is built at its real size on weights that take no memory (one value, repeated by strides) and goes
through the same probe as a stage that loads. So what a node would refuse is refused here, and keys and values are counted, not
guessed. The self-check, which needs weights, is left to the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from farflung.core.errors import UnsupportedModel
from farflung.core.model import LayerRange
from farflung.engine.kernel_plan import is_narrowed
from farflung.engine.kv_tensors import KvShape
from farflung.engine.loader import hollow_stage
from farflung.engine.recipe import learn_calls
from farflung.engine.skeleton import Anatomy, Config, Skeleton, anatomy, build_skeleton, describe_shape


@dataclass(frozen=True)
class Sizes:
    """Numbers of values.

    Attributes:
        layers: parameters of each decoder layer.
        linear: of these, weights that a node can round to int8 or int4.
        embedding: parameters of the embedding.
        head: parameters of final norm and head; a head tied to the embedding counts there only.
        kv: keys and values that one token leaves in each layer.
    """

    layers: tuple[int, ...]
    linear: tuple[int, ...]
    embedding: int
    head: int
    kv: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.layers) + self.embedding + self.head


@dataclass(frozen=True)
class Inspection:
    """What can be said of a model.

    Attributes:
        family: the ``model_type`` of transformers.
        reason: why it cannot be split; None where it can.
        hidden_size, vocab_size, context_tokens: None where it cannot be split.
        sizes: None where it cannot be split.
        exact_tokens: length up to which sessions are taken; None: the whole context.
    """

    family: str
    reason: str | None
    hidden_size: int | None = None
    vocab_size: int | None = None
    context_tokens: int | None = None
    sizes: Sizes | None = None
    exact_tokens: int | None = None

    @property
    def splittable(self) -> bool:
        return self.reason is None


def inspect_config(config: Config) -> Inspection:
    """Never raises UnsupportedModel: that is the reason then."""
    try:
        return _inspect(config)
    except UnsupportedModel as error:
        return Inspection(config.model_type, error.message)


def _inspect(config: Config) -> Inspection:
    from farflung.engine.attention import ATTENTION

    shape = describe_shape(config)
    model = build_skeleton(config, ATTENTION)
    parts = anatomy(model)
    layers = model.get_submodule(parts.layers)
    kinds = [_kind(config, layer, index) for index, layer in enumerate(layers)]
    found: dict[object, tuple[KvShape, int | None]] = {}
    for index in _to_try(kinds):
        recipe = learn_calls(hollow_stage(config, LayerRange(index, index + 1)))
        found[kinds[index]] = recipe.shapes[index], recipe.limit
    limits = [limit for _, limit in found.values() if limit is not None]
    kv = tuple(found[kind][0].heads * (found[kind][0].key_width + found[kind][0].value_width) for kind in kinds)
    return Inspection(
        family=config.model_type,
        reason=None,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        context_tokens=shape.context_tokens,
        sizes=_sizes(model, parts, kv),
        exact_tokens=min(limits, default=None),
    )


def _to_try(kinds: Sequence[object]) -> list[int]:
    """The first layer of each kind, and the last layer of all, whose stage ends with norm and head."""
    return sorted({kinds.index(kind) for kind in kinds} | {len(kinds) - 1})


def _kind(config: Config, layer: Any, index: int) -> object:
    """Layers of a kind have the same parameters, and the same entry in every list of the configuration with one per layer."""
    count = config.num_hidden_layers
    entries = [
        (key, str(value[index]))
        for key, value in vars(config).items()
        if isinstance(value, list) and len(value) == count and len({str(entry) for entry in value}) < count
    ]
    return tuple(entries), tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def _sizes(model: Skeleton, parts: Anatomy, kv: tuple[int, ...]) -> Sizes:
    def count(place: str) -> int:
        return sum(parameter.numel() for parameter in model.get_submodule(place).parameters())

    def narrowed(place: str) -> int:
        return sum(module.weight.numel() for module in model.get_submodule(place).modules() if is_narrowed(module))

    tied = f"{parts.head}.weight" in model.all_tied_weights_keys
    return Sizes(
        layers=tuple(count(f"{parts.layers}.{index}") for index in range(len(kv))),
        linear=tuple(narrowed(f"{parts.layers}.{index}") for index in range(len(kv))),
        embedding=count(parts.embed),
        head=count(parts.norm) + (0 if tied else count(parts.head)),
        kv=kv,
    )

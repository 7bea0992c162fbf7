"""How big a model is, layer by layer, and how much of it fits here. From the configuration alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farflung.core.errors import UsageError
from farflung.core.model import LayerRange
from farflung.core.units import Bytes

if TYPE_CHECKING:
    from farflung.engine.source import ModelSource

MEMORY_SHARE_WEIGHTS = 0.6
"""Of the free memory, for weights; the rest is for KV, activations and everybody else."""

MEMORY_SHARE_KV = 0.25

MOST_KV_TOKENS = 32_768
"""By default; more is asked for with --kv-tokens."""

LEAST_KV_TOKENS = 256


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of values.

    Attributes:
        layers: parameters of each decoder layer.
        embedding: parameters of the embedding.
        head: parameters of final norm and head; a head tied to the embedding counts there only.
        kv_values_per_layer: keys and values that one token leaves in one layer.
    """

    layers: tuple[int, ...]
    embedding: int
    head: int
    kv_values_per_layer: int

    @property
    def total(self) -> int:
        return sum(self.layers) + self.embedding + self.head


def model_sizes(source: ModelSource) -> ModelSizes:
    """Raises UnsupportedModel for a family that cannot be split."""
    from farflung.engine.skeleton import anatomy, build_skeleton

    config = source.config()
    model = build_skeleton(config)
    parts = anatomy(model)

    def count(module: Any) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    tied = f"{parts.head}.weight" in model.all_tied_weights_keys
    return ModelSizes(
        layers=tuple(count(layer) for layer in model.get_submodule(parts.layers)),
        embedding=count(model.get_submodule(parts.embed)),
        head=count(model.get_submodule(parts.norm)) + (0 if tied else count(model.get_submodule(parts.head))),
        kv_values_per_layer=_kv_values(config),
    )


def layers_that_fit(source: ModelSource, weight_bytes: int) -> int:
    """How many layers fit the free memory, embedding and head counted in."""
    sizes = model_sizes(source)
    room = _free_memory() * MEMORY_SHARE_WEIGHTS - (sizes.embedding + sizes.head) * weight_bytes
    fit = int(room // (max(sizes.layers) * weight_bytes))
    if fit < 1:
        raise UsageError(
            f"not one layer of {source.name} fits: {Bytes(int(_free_memory()))} are free, embedding and head take "
            f"{Bytes((sizes.embedding + sizes.head) * weight_bytes)}",
            hint="close programs, choose --dtype bf16, or name the layers with --layers",
        )
    return fit


def kv_tokens_that_fit(source: ModelSource, layers: LayerRange, value_bytes: int) -> int:
    """Tokens whose keys and values fit a share of the free memory, within bounds."""
    per_token = _kv_values(source.config()) * len(layers) * value_bytes
    return max(LEAST_KV_TOKENS, min(MOST_KV_TOKENS, int(_free_memory() * MEMORY_SHARE_KV // per_token)))


def _kv_values(config: Any) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * heads * width)


def _free_memory() -> float:
    import psutil

    return float(psutil.virtual_memory().available)

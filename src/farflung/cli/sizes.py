"""How big a model is, layer by layer, and how much of it fits here. From the configuration alone: no weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farflung.core.errors import UnsupportedModel, UsageError
from farflung.core.model import LayerRange
from farflung.core.units import Bytes

if TYPE_CHECKING:
    from farflung.engine.inspect import Sizes
    from farflung.engine.kernel_plan import Quantised
    from farflung.engine.source import ModelSource

MEMORY_SHARE_WEIGHTS = 0.6
"""Of the free memory, for weights; the rest is for KV, activations and everybody else."""

MEMORY_SHARE_KV = 0.25

MOST_KV_TOKENS = 32_768
"""By default; more is asked for with --kv-tokens."""

LEAST_KV_TOKENS = 256


def sizes_of(source: ModelSource) -> Sizes:
    """Raises UnsupportedModel for a family that cannot be split."""
    from farflung.engine.inspect import inspect_config

    found = inspect_config(source.config())
    if found.sizes is None:
        raise UnsupportedModel(found.reason or f"{source.name} cannot be split")
    return found.sizes


def layers_that_fit(source: ModelSource, value_bytes: int, quantised: Quantised | None = None) -> int:
    """How many layers fit the free memory, embedding and head counted in.

    Args:
        value_bytes: of a weight that is not quantised.
        quantised: what linear maps are rounded to; the head is int8 then in any case.
    """
    from farflung.engine.kernel_plan import INT8_BYTES
    from farflung.engine.quantise import INT4_BYTES

    sizes = sizes_of(source)
    linear_bytes = {None: float(value_bytes), "int8": INT8_BYTES, "int4": INT4_BYTES}[quantised]
    layer = max(
        count * value_bytes - linear * (value_bytes - linear_bytes)
        for count, linear in zip(sizes.layers, sizes.linear, strict=True)
    )
    ends = sizes.embedding * value_bytes + sizes.head * (value_bytes if quantised is None else INT8_BYTES)
    fit = int((weights_room() - ends) // layer)
    if fit < 1:
        raise UsageError(
            f"not one layer of {source.name} fits: {Bytes(int(_free_memory()))} are free, embedding and head take "
            f"{Bytes(int(ends))}",
            hint="close programs, choose --dtype int4, or name the layers with --layers",
        )
    return fit


def weights_room() -> int:
    """Bytes of the free memory that weights may take."""
    return int(_free_memory() * MEMORY_SHARE_WEIGHTS)


def kv_tokens_that_fit(source: ModelSource, layers: LayerRange, value_bytes: int) -> int:
    """Tokens whose keys and values fit a share of the free memory, within bounds."""
    per_token = sum(sizes_of(source).kv[layers.start : layers.stop]) * value_bytes
    return max(LEAST_KV_TOKENS, min(MOST_KV_TOKENS, int(_free_memory() * MEMORY_SHARE_KV // per_token)))


def _free_memory() -> float:
    import psutil

    return float(psutil.virtual_memory().available)

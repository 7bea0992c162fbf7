"""The real ``transformers`` class of a model, on the meta device (no memory), and where its parts are.

Nothing here knows a family by name: layers are the ``ModuleList`` as long as the configuration says, the final norm is what
follows them, and whatever else of the text model has weights makes the family one that cannot be split (refused by name).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from farflung.core.errors import UnsupportedModel
from farflung.core.ids import ModelDigest
from farflung.core.model import ModelSpec

Config = Any
"""A ``transformers`` configuration object (the library has no types)."""

Skeleton = Any
"""A ``transformers`` causal language model on the meta device."""

MAX_LAYERS = 4096
"""Building a layer costs time even without memory; a forged configuration must not cost hours."""


def _counts_layers(key: str) -> bool:
    return "layers" in key or key.endswith("layer") or "block_count" in key


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Around calls that hand a stranger's configuration to transformers, which fails on a bad one in many ways: raises
    UnsupportedModel instead, with its reason."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (
        ValueError,  # and text that is no UTF-8
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
        OSError,  # its name for a file that it cannot parse
        StrictDataclassError,
    ) as error:
        raise UnsupportedModel(f"transformers cannot make {what} of this configuration: {error}") from error


_LACKS = {
    "num_hidden_layers": "its configuration has no number of layers of its own (it is made of several models)",
    "max_position_embeddings": "it knows no longest text (its state is recurrent, or its positions are not rotary)",
}
"""What it means that a number of the configuration is absent."""


@dataclass(frozen=True)
class Anatomy:
    """Names of a skeleton's parts, from the whole model (``model.layers``).

    Attributes:
        base: the text model.
        embed: token embedding.
        layers: the list of decoder layers.
        norm: the norm after the last layer.
        head: the output projection.
        others: modules of the text model without weights (rotary embeddings).
    """

    base: str
    embed: str
    layers: str
    norm: str
    head: str
    others: tuple[str, ...]


def build_skeleton(config: Config, attention: str | None = None) -> Skeleton:
    """The causal language model of ``config`` on the meta device.

    Args:
        attention: a name of transformers' attention interface; None leaves the choice to it.

    Raises UnsupportedModel for an unknown family. Code from a model repository is never run.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModel(f"family {config.model_type!r} is no causal language model of transformers")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            f"this {config.model_type} checkpoint is quantised in a way that is not read here",
            hint="use the original weights or a GGUF file of them",
        )
    layer_count(config)
    try:
        with understood(f"a {config.model_type}"), torch.device("meta"), no_init_weights():
            return AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
            ).eval()
    except UnsupportedModel as error:
        if attention is not None and isinstance(error.__cause__, LookupError) and error.__cause__.args == (attention,):
            raise UnsupportedModel(
                f"family {config.model_type!r} cannot be split: it has attention classes of its own, beside transformers' "
                "attention interface"
            ) from error
        raise


def layer_count(config: Config) -> int:
    """Number of decoder layers. Raises UnsupportedModel where the configuration has none, or absurdly many."""
    count = _number(config, "num_hidden_layers")
    refuse_absurd({"num_hidden_layers": count})
    return count


def refuse_absurd(raw: Mapping[str, object]) -> None:
    """Raises UnsupportedModel where a raw configuration asks for more layers than ``MAX_LAYERS``. Called before transformers
    sees it, which writes a list of as many entries."""
    for key, value in raw.items():
        if isinstance(value, dict):
            refuse_absurd(value)
        elif isinstance(value, int) and value > MAX_LAYERS and _counts_layers(key):
            raise UnsupportedModel(f"the configuration sets {key} to {value}; more than {MAX_LAYERS} layers are not built")


def anatomy(model: Skeleton) -> Anatomy:
    """Finds the parts of a skeleton. Raises UnsupportedModel, with the reason, where it has parts that cannot be split."""
    config = model.config
    family, count = config.model_type, layer_count(config)
    names = {id(module): name for name, module in model.named_modules()}
    base, embed, head = model.base_model, model.get_input_embeddings(), model.get_output_embeddings()
    if base is model and embed is not None:  # its name for the text model fits another class of the family
        base = model.get_submodule(names[id(embed)].rpartition(".")[0])
    if base is model or embed is None or head is None:
        raise UnsupportedModel(f"family {family!r} has no text model, embedding and head that can be told apart")
    parts: dict[str, str] = {}
    others: list[str] = []
    for name, child in base.named_children():
        full = f"{names[id(base)]}.{name}"
        if child is embed:
            continue
        if isinstance(child, nn.ModuleList) and len(child) == count and "layers" not in parts:
            parts["layers"] = full
        elif "Norm" in type(child).__name__ and "layers" in parts and "norm" not in parts:
            parts["norm"] = full
        elif not child.state_dict():
            others.append(full)
        else:
            raise UnsupportedModel(
                f"family {family!r} cannot be split: {full} ({type(child).__name__}) belongs to no single stage"
            )
    if loose := [name for name, _ in base.named_parameters(recurse=False)]:
        raise UnsupportedModel(f"family {family!r} cannot be split: {', '.join(loose)} belongs to no single stage")
    if parts.keys() != {"layers", "norm"} or id(embed) not in {id(child) for child in base.children()}:
        raise UnsupportedModel(f"family {family!r} has no list of {count} layers between one embedding and one norm")
    return Anatomy(names[id(base)], names[id(embed)], parts["layers"], parts["norm"], names[id(head)], tuple(others))


def slice_config(config: Config, start: int, stop: int) -> None:
    """Narrows a configuration to layers ``start`` to ``stop``: their number, and every list that has one entry per layer.

    transformers' forward looks per-layer values up by the place of a layer in the list it walks, so these must be cut as the
    list of layers is.
    """
    count = config.num_hidden_layers
    config.num_hidden_layers = stop - start
    for key, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == count:
            setattr(config, key, value[start:stop])


@dataclass(frozen=True)
class Shape:
    """The numbers of a configuration that everybody needs; see ``ModelSpec``."""

    layers: int
    hidden_size: int
    vocab_size: int
    context_tokens: int


def describe_shape(config: Config) -> Shape:
    """Raises UnsupportedModel where a number is missing."""
    return Shape(
        layers=layer_count(config),
        hidden_size=_number(config, "hidden_size"),
        vocab_size=_number(config, "vocab_size"),
        context_tokens=_number(config, "max_position_embeddings"),
    )


def describe(config: Config, name: str, digest: ModelDigest, eos_token_ids: tuple[int, ...]) -> ModelSpec:
    """The noun that travels. Raises UnsupportedModel where a number is missing."""
    shape = describe_shape(config)
    return ModelSpec(
        name=name,
        family=config.model_type,
        digest=digest,
        layers=shape.layers,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        context_tokens=shape.context_tokens,
        eos_token_ids=eos_token_ids,
    )


def _number(config: Config, key: str) -> int:
    with understood("a text model"):
        value = getattr(config, key, None)
    if not isinstance(value, int) or value <= 0:
        why = _LACKS.get(key, f"its configuration has no usable {key}: {value!r}")
        raise UnsupportedModel(f"family {config.model_type!r} cannot be split: {why}")
    return value

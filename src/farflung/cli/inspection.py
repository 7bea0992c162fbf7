"""What ``farflung models inspect`` says, as JSON and as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farflung.core.units import Bytes

if TYPE_CHECKING:
    from farflung.engine.inspect import Inspection

_WIDTH = {"fp32": 4, "bf16": 2}


def inspection_json(name: str, found: Inspection, digest: str | None) -> dict[str, Any]:
    """The keys are described in the command's help."""
    sizes = found.sizes
    return {
        "name": name,
        "family": found.family,
        "splittable": found.splittable,
        "reason": found.reason,
        "layers": len(sizes.layers) if sizes else None,
        "hidden_size": found.hidden_size,
        "vocab_size": found.vocab_size,
        "context_tokens": found.context_tokens,
        "exact_tokens": found.exact_tokens,
        "parameters": sizes.total if sizes else None,
        "layer_parameters": list(sizes.layers) if sizes else None,
        "bytes_per_layer": _by_dtype(max(sizes.layers)) if sizes else None,
        "bytes_embedding_and_head": _by_dtype(sizes.embedding + sizes.head) if sizes else None,
        "kv_bytes_per_token_and_layer": _by_dtype(max(sizes.kv)) if sizes else None,
        "kv_bytes_per_token": _by_dtype(sum(sizes.kv)) if sizes else None,
        "activation_bytes_per_token": _activations(found.hidden_size) if found.hidden_size else None,
        "digest": digest,
    }


def inspection_lines(name: str, found: Inspection) -> list[str]:
    """For people."""
    sizes = found.sizes
    if sizes is None or found.hidden_size is None:
        return [f"{name}: family {found.family}", f"cannot be split: {found.reason}"]
    lines = [
        f"{name}: family {found.family}, {sizes.total / 1e9:.2f} billion parameters, {len(sizes.layers)} layers, splittable",
        f"hidden size {found.hidden_size}, vocabulary {found.vocab_size}, context {found.context_tokens} tokens",
        f"one layer {Bytes(max(sizes.layers) * 2)} in bf16, embedding and head {Bytes((sizes.embedding + sizes.head) * 2)}",
        f"KV cache {Bytes(max(sizes.kv) * 2)} per token and layer in bf16, {Bytes(sum(sizes.kv) * 2)} per token in all",
        "between stages, per token: "
        + ", ".join(f"{Bytes(size)} in {codec}" for codec, size in _activations(found.hidden_size).items()),
    ]
    if found.exact_tokens is not None:
        lines.append(f"sessions of up to {found.exact_tokens} tokens: from there on its attention goes by chunks")
    return lines


def _by_dtype(values: int) -> dict[str, int]:
    return {name: values * width for name, width in _WIDTH.items()}


def _activations(hidden_size: int) -> dict[str, int]:
    from farflung.wire.codec import CODEC_NAMES, codec

    return {name: codec(name).row_bytes(hidden_size) for name in CODEC_NAMES}

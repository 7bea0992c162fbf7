"""Tiny random models, saved as the hub's layout, so that tests run real classes on real files without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FAMILIES = ("llama", "qwen2", "gemma3_text", "mistral")

VOCABULARY = 320
HIDDEN = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_SPECIAL: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 32},
    "mistral": {"sliding_window": 24},
}


def tiny_config(family: str, *, layers: int = 6, **changes: Any) -> Any:
    """A small configuration of the family; ``changes`` are keys of transformers."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, num_hidden_layers=layers, **{**_COMMON, **_SPECIAL.get(family, {}), **changes})


def tiny_model(family: str, path: Path, *, layers: int = 6, seed: int = 0, shard: str = "50GB", **changes: Any) -> Path:
    """Saves a random model of the family under ``path`` and returns it.

    Weights are drawn wide enough (0.08, norms around their usual value) that logits differ clearly between tokens.

    Args:
        layers: decoder layers.
        seed: of the weights.
        shard: largest size of one weight file, e.g. ``200KB`` for several.
        changes: further keys of the configuration.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, layers=layers, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.08)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, max_shard_size=shard)
    return path


def whole_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same model as plain transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

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


def tiny_gguf(
    family: str, path: Path, *, layers: int = 4, seed: int = 0, types: tuple[str, ...] = ("F32",), tokens: int = 5000
) -> Path:
    """Writes a random GGUF file of the family (llama, qwen2, gemma3_text), as converters lay it out.

    Args:
        types: quantisations, given to matrices in turn; vectors are F32 as in real files.
        tokens: entries of the vocabulary, more than any other array has.
    """
    import gguf
    import numpy as np
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    config = tiny_config(family, layers=layers, vocab_size=tokens, hidden_size=256, head_dim=64, intermediate_size=512)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    architecture = {"gemma3_text": "gemma3"}.get(family, family)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    if family == "gemma3_text":
        writer.add_sliding_window(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{index}" for index in range(tokens)])
    writer.add_token_types([1] * tokens)
    writer.add_eos_token_id(2)
    writer.add_string("tokenizer.ggml.pre", "default")
    random = np.random.default_rng(seed)
    weights = model.state_dict()
    stored = {name: hf for name, hf in get_gguf_hf_weights_map(model, TensorProcessor()).items() if hf in weights}
    if model.config.tie_word_embeddings:
        stored.pop("output.weight", None)
    for index, (name, parameter) in enumerate(stored.items()):
        values = random.normal(0.0, 0.08, tuple(weights[parameter].shape)).astype(np.float32)
        kind = gguf.GGMLQuantizationType[types[index % len(types)] if values.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""Any family of transformers, small: its default configuration with every number that costs memory made tiny.

The names are those that configurations use for the same few things; a family keeps all else of its defaults (which layers
slide, which have experts, scalings), so that what makes it special is tried too.
"""

from __future__ import annotations

from typing import Any

LAYERS, VOCABULARY, CONTEXT, WINDOW = 6, 320, 512, 16

_SIZES: dict[int, tuple[str, ...]] = {
    LAYERS: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"),
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input"),
    CONTEXT: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"),
    WINDOW: ("sliding_window", "sliding_window_size", "window_size", "attention_window", "local_attention"),
    128: ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "model_dim"),
    4: ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads", "num_heads"),
    2: ("num_key_value_heads", "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "encoder_layers",
        "num_encoder_layers"),
    32: ("head_dim", "kv_lora_rank", "q_lora_rank", "swa_head_dim", "global_head_dim"),
    192: ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size",
          "dim_ff", "intermediate_size_mlp", "dense_intermediate_size"),
    96: ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
    8: ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    16: ("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "index_head_dim", "mamba_d_state", "linear_key_head_dim",
         "linear_value_head_dim", "mamba_d_head", "mamba_head_dim", "ssm_state_size", "state_size"),
    24: ("v_head_dim",),
    1: ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"),
}  # fmt: skip
TINY: dict[str, int] = {name: size for size, names in _SIZES.items() for name in names}

_MAY_BE_NONE = {"head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts"}
"""Sizes that some families leave open, though they need them."""

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": 2}

_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}

_GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}
"""An attention_multiplier of 1, the default, makes rounding errors ten times as large."""

_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2), "sliding_window": WINDOW}
_LATER_SLIDE = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": LAYERS // 2}

SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_oss": {"rope_parameters": _PLAIN_ROPE},
    "bamba": {"mamba_n_heads": 16},
    "cohere": {"use_qk_norm": True},
    "cohere2_moe": {"num_shared_experts": 1},
    "cohere_compass_text": {
        **_SLIDING,
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _PLAIN_ROPE),
    },
    "dots1": _SLIDING,
    "falcon_h1": {"mamba_n_heads": 16, "mamba_d_ssm": 256},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "glm4_moe": {"use_qk_norm": True},
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoeshared": _GRANITE,
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"mamba_n_heads": 16},
    "laguna": _SLIDING,
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * (LAYERS // 3)},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * (LAYERS // 3)},
    "mamba2": {"num_heads": 8},
    "mellum": _SLIDING,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * (LAYERS // 2)},
    "ministral3": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW},
    "olmo": {"clip_qkv": 1.0},
    "olmoe": {"clip_qkv": 1.0},
    "phi": {"qk_layernorm": True},
    "phimoe": {"sliding_window": WINDOW},
    "qwen2": _LATER_SLIDE,
    "qwen2_moe": _LATER_SLIDE,
    "qwen3": _LATER_SLIDE,
    "qwen3_moe": _LATER_SLIDE,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [64, 64]},
    "smollm3": _LATER_SLIDE,
    "starcoder2": {"sliding_window": WINDOW},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * (LAYERS // 2)},
    "zaya": {"num_experts_per_tok": 1},
    "phi3": {"rope_parameters": {**_PLAIN_ROPE, "partial_rotary_factor": 1.0}, "sliding_window": WINDOW},
}
"""What a family needs beside: its defaults do not fit a tiny model, or switch off what its models have."""


_PER_LAYER_INPUT = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")

NO_DEFAULT = {"gemma4_assistant": {"text_config": dict.fromkeys(_PER_LAYER_INPUT, 0)}}
"""What a type's configuration needs to be made at all."""


def _value(config: Any, name: str, absent: Any) -> Any:
    try:
        return getattr(config, name, absent)
    except (LookupError, RuntimeError):  # differs by layer
        return absent


def tiny_arguments(default: Any, model_type: str = "") -> dict[str, Any]:
    """Keywords for the class of ``default`` that make it tiny."""
    names = set(default.to_dict()) | set(getattr(default, "attribute_map", {}))
    found: dict[str, Any] = {
        name: size
        for name, size in TINY.items()
        if name in names and (name in _MAY_BE_NONE or _value(default, name, 0) is not None)
    }
    found |= {name: 0 for name in _PER_LAYER_INPUT if _value(default, name, None) == 0}
    if "qk_rope_head_dim" in names:  # attention over a latent: every head has keys of its own, rotated in part
        found |= {"num_key_value_heads": 4, "head_dim": 16}
    found |= {name: token for name, token in _TOKENS.items() if _value(default, name, None) is not None}
    if "pad_token_id" in names:
        found["pad_token_id"] = 0
    mapped = getattr(default, "attribute_map", {})
    found = {name: value for name, value in found.items() if mapped.get(name) not in found or mapped.get(name) == name}
    for name in getattr(default, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None and hasattr(part, "to_dict"):
            found[name] = type(part)(**tiny_arguments(part, part.model_type))
    return found | SPECIAL.get(model_type, {})


def any_tiny_config(model_type: str, **changes: Any) -> Any:
    """A tiny configuration of any type."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    default = kind(**NO_DEFAULT.get(model_type, {}))
    config = kind(**{**tiny_arguments(default, model_type), **changes})
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        if part is not None:
            _cut_lists(part, type(part)())
    return config


def _cut_lists(config: Any, default: Any) -> None:
    """Lists with one entry for each of the default's layers get one for each of ours."""
    before = getattr(default, "num_hidden_layers", None)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before and before != LAYERS:
            setattr(config, name, value[: LAYERS - 1] + value[-1:])

"""Decoder layers written out by hand for one family shape (Llama, Qwen2): what a stage's generality is measured against.

One session, one contiguous cache, fused projections in oneDNN's layout, no Python beyond the calls of torch themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from farflung.engine.kernels import Packed


class BlockStack:
    """Layers, final norm and head of a loaded ``StageModule`` in bf16, weights packed anew."""

    def __init__(self, stage: Any, tokens: int) -> None:
        config = stage.config
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._hidden, self._eps = config.hidden_size, config.rms_norm_eps
        self._layers = [self._packed(layer) for layer in stage.layers]
        self._norm, self._head = stage.norm.weight, Packed(stage.head.weight.detach(), None)
        self._embed = stage.embed
        positions = torch.arange(tokens)[None]
        cos, sin = stage.rotary[0](torch.zeros(1, 1, dtype=torch.bfloat16), positions)
        self._cos, self._sin = cos[:, :, None], sin[:, :, None]
        shape = (len(self._layers), 1, self._groups, tokens, self._width)
        self._keys, self._values = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)
        self._past = 0

    @staticmethod
    def _packed(layer: Any) -> tuple[torch.Tensor, Packed, Packed, torch.Tensor, Packed, Packed]:
        attention, mlp = layer.self_attn, layer.mlp
        three = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = None if three[0].bias is None else torch.cat([linear.bias for linear in three])
        return (
            layer.input_layernorm.weight,
            Packed(torch.cat([linear.weight for linear in three]), bias),
            Packed(attention.o_proj.weight, None),
            layer.post_attention_layernorm.weight,
            Packed(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), None),
            Packed(mlp.down_proj.weight, None),
        )

    def reset(self) -> None:
        self._past = 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [1, n] to the logits of the last one."""
        past, rows = self._past, ids.shape[1]
        heads, groups, half = self._heads, self._groups, self._width // 2
        cos, sin = self._cos[:, past : past + rows], self._sin[:, past : past + rows]
        mask = None
        if rows > 1:
            mask = torch.ones(rows, past + rows, dtype=torch.bool).tril_(past)
        x = self._embed(ids)
        for index, (norm_1, qkv, out, norm_2, gate_up, down) in enumerate(self._layers):
            mixed = qkv(rms_norm(x, (self._hidden,), norm_1, self._eps)).view(1, rows, heads + 2 * groups, self._width)
            both = mixed[:, :, : heads + groups]
            both = both * cos + torch.cat([-both[..., half:], both[..., :half]], -1) * sin
            keys, values = self._keys[index], self._values[index]
            keys[:, :, past : past + rows] = both[:, :, heads:].transpose(1, 2)
            values[:, :, past : past + rows] = mixed[:, :, heads + groups :].transpose(1, 2)
            seen, held = keys[:, :, : past + rows], values[:, :, : past + rows]
            if rows == 1:
                query = both[:, :, :heads].reshape(1, groups, heads // groups, self._width)
                attended = scaled_dot_product_attention(query, seen, held).reshape(1, 1, -1)
            else:
                query = both[:, :, :heads].transpose(1, 2)
                attended = scaled_dot_product_attention(query, seen, held, attn_mask=mask, enable_gqa=True)
                attended = attended.transpose(1, 2).reshape(1, rows, -1)
            x = x + out(attended)
            gate, up = gate_up(rms_norm(x, (self._hidden,), norm_2, self._eps)).chunk(2, -1)
            x = x + down(silu(gate) * up)
        self._past = past + rows
        return self._head(rms_norm(x[:, -1:], (self._hidden,), self._norm, self._eps))

"""Attention over our KV pool, as a function that transformers calls.

Registered with ``AttentionInterface`` under ``ATTENTION``: a name that transformers has no mask function for makes it skip its
own masks, and a keyword handed to a layer reaches the function, so that nothing here is global. One packed pass is
``[1, rows, ...]`` with the rows of several sessions side by side; ``segments`` says what they see, and which share a call.

Measured on a CPU (bf16 and fp32, 14 query and 2 key heads): for few rows, folding the query heads of a group into the rows
reads each key once and is 5 to 14 times faster in bf16 than repeating keys; from some 32 rows on all variants lie within 10%,
the causal triangle as a mask no slower than ``is_causal``. So one masked call per pass serves prompts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from farflung.core.errors import UnsupportedModel
from farflung.engine.kv_tensors import KvTensors
from farflung.engine.masks import register_rules
from farflung.engine.segments import FOLD_ROWS, Group, PassPlan

ATTENTION = "farflung"
EXPLICIT_SCORES = 2**24
"""Scores held at a time where they are written out (softcap, sinks): 64 MiB of fp32."""


class Scores(NamedTuple):
    """How a layer turns products of queries and keys into weights.

    Attributes:
        scaling: factor on the products.
        window: positions a query sees back, itself included; None: all.
        softcap: bounds scores by tanh.
        sinks: [heads], one more logit each, to which no value belongs.
    """

    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


class AttentionCall(NamedTuple):
    """One call of a layer, as transformers makes it: query, key and value are [1, heads, rows, width].

    Attributes:
        others: further keywords.
    """

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scores: Scores
    mask: Any
    others: dict[str, Any]


class Watcher(Protocol):
    """What learns and tries a recipe, in the place of ``StepAttention``."""

    def watch(self, call: AttentionCall) -> torch.Tensor:
        """[1, rows, heads, width]."""


class StepAttention:
    """What one pass hands to the attention of every layer."""

    def __init__(self, kv: KvTensors, cells: torch.Tensor, plan: PassPlan) -> None:
        """``cells``: int64 [rows], the pool cell of each row. ``plan`` covers all rows."""
        self._kv = kv
        self._cells = cells
        self._plan = plan

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Writes keys and values of the rows, then attends: [1, heads, rows, width] to [1, rows, heads, width]."""
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        keys.index_copy_(2, self._cells, key)
        values.index_copy_(2, self._cells, value)
        attend = _attend if scores.softcap is None and scores.sinks is None else _attend_explicit
        groups, order = self._plan.groups(scores.window)
        rows = query[0].transpose(0, 1)  # [rows, heads, width], how transformers has them in memory
        if len(groups) == 1:
            out = attend(_rows_of(rows, groups[0]), groups[0].view(keys), groups[0].view(values), groups[0], scores)
        else:
            out = torch.cat(
                [attend(_rows_of(rows, group), group.view(keys), group.view(values), group, scores) for group in groups]
            )
        return (out if order is None else out.index_select(0, order))[None]


def _rows_of(rows: torch.Tensor, group: Group) -> torch.Tensor:
    """Rows [rows of the pass, heads, width] of the group's segments, [segments, rows, heads, width]; a view where they are
    neighbours in order."""
    count = len(group.starts)
    if group.first_row is None:
        chosen = rows[group.row_order]
    elif count * group.rows == len(rows):
        chosen = rows
    else:
        chosen = rows[group.first_row : group.first_row + count * group.rows]
    return chosen[None] if count == 1 else chosen.unflatten(0, (count, group.rows))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Group, scores: Scores) -> torch.Tensor:
    """[segments, rows, heads, width] over [segments, kv heads, keys, width]; returns [segments x rows, heads, width]."""
    count, rows, heads, width = query.shape
    groups = key.shape[1]
    each = heads // groups
    if rows == 1:
        mask = None if group.mask is None else group.mask[:, None].expand(-1, -1, each, -1)
        grouped = query.reshape(count, groups, each, width)
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scores.scaling)
        return out.reshape(count, heads, -1)
    if rows <= FOLD_ROWS:
        folded = query.transpose(1, 2).reshape(count, groups, each * rows, width)
        out = scaled_dot_product_attention(folded, key, value, attn_mask=group.folded_mask(each), scale=scores.scaling)
        return out.reshape(count, heads, rows, -1).transpose(1, 2).flatten(0, 1)
    keys = key[0, :, None].expand(-1, each, -1, -1)
    values = value[0, :, None].expand(-1, each, -1, -1)
    grouped = query[0].transpose(0, 1).unflatten(0, (groups, each))
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask, scale=scores.scaling)
    return out.flatten(0, 1).transpose(0, 1)


def _attend_explicit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Group, scores: Scores) -> torch.Tensor:
    """The same with the scores written out, in fp32, for what ``scaled_dot_product_attention`` cannot do."""
    count, rows, heads, _ = query.shape
    groups, length = key.shape[1:3]
    grouped = query.transpose(1, 2).unflatten(1, (groups, heads // groups)).float()  # [segments, kv heads, each, rows, width]
    keys, values = key.float()[:, :, None].transpose(3, 4), value.float()[:, :, None]
    parts: list[torch.Tensor] = []
    step = max(1, EXPLICIT_SCORES // (count * heads * length))
    for start in range(0, rows, step):
        products = grouped[:, :, :, start : start + step] @ keys * scores.scaling
        if scores.softcap is not None:
            products = torch.tanh(products / scores.softcap) * scores.softcap
        if group.mask is not None:
            products = products + group.mask[:, None, None, start : start + step]
        if scores.sinks is not None:
            sinks = scores.sinks.float().view(groups, -1, 1, 1).expand(count, -1, -1, products.shape[3], 1)
            products = torch.cat([products, sinks], -1)
        parts.append(products.softmax(-1)[..., :length] @ values)
    out = torch.cat(parts, 3).flatten(1, 2).transpose(1, 2)  # [segments, rows, heads, width]
    return out.flatten(0, 1).to(query.dtype)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    farflung: StepAttention | Watcher | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer; ``farflung`` is the keyword that the layer was handed."""
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    if farflung is None:
        raise UnsupportedModel("its layers do not hand keywords on to their attention")
    if not isinstance(farflung, StepAttention):
        return farflung.watch(AttentionCall(module, query, key, value, scores, attention_mask, others)), None
    return farflung.attend(module.layer_idx, query, key, value, scores).contiguous(), None  # some families view it


AttentionInterface.register(ATTENTION, _attention)
register_rules(ATTENTION)

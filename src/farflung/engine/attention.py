"""Attention over our KV pool, as a function that transformers calls.

Registered with ``AttentionInterface`` under ``ATTENTION``: a name that transformers has no mask function for makes it skip its
own masks, and a keyword handed to a layer reaches the function, so that nothing here is global. One packed pass is
``[1, rows, ...]`` with the rows of several sessions side by side; a ``Segment`` says for each session what its rows see.

Measured on a CPU (bf16 and fp32, 14 query and 2 key heads): for few rows, folding the query heads of a group into the rows
reads each key once and is 5 to 14 times faster in bf16 than repeating keys; from some 32 rows on all variants lie within 10%,
the causal triangle as a mask no slower than ``is_causal``. So one masked call per pass serves prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from farflung.engine.kv_pool import NewRows, SessionCells
from farflung.engine.kv_tensors import KvTensors
from farflung.engine.masks import register_rules

ATTENTION = "farflung"
FOLD_ROWS = 32
"""Up to this many rows of a session, query groups are folded into rows."""
BLOCK_ROWS = 256
"""At most this many rows go through the layers at a time; longer windows go in several passes."""
MASK_CELLS = 2**23
"""Values of one mask: 32 MiB of fp32, 256 rows over 32k keys. Over more keys fewer rows go at a time."""
EXPLICIT_SCORES = 2**24
"""Scores held at a time where they are written out (softcap, sinks): 64 MiB of fp32."""


def max_rows(keys: int) -> int:
    """Rows of a session that may meet ``keys`` cells at a time, so that no mask has more than ``MASK_CELLS`` values."""
    return max(1, min(BLOCK_ROWS, MASK_CELLS // max(1, keys)))


def causal_mask(rows: int, past: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[rows, past + rows]: 0 where seen, minus infinity elsewhere.

    Row i sees columns up to ``past + i``, in a window of W from ``past + i - W + 1`` on. Made anew for each step: 6 ms for 256
    rows over 32k keys, where the layers take seconds.
    """
    hidden = torch.full((rows, past + rows), -torch.inf, dtype=dtype)
    if window is None:
        return hidden.triu_(past + 1)
    return hidden.triu(past + 1) + hidden.tril_(past - window)


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


class Keys(NamedTuple):
    """What the rows of a segment meet: cells ``low <= i < high`` of the pool, under an additive mask if any."""

    low: int
    high: int
    mask: torch.Tensor | None


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


class Segment:
    """The rows of one session in a pass, and what they see."""

    def __init__(self, start: int, base: int, rows: NewRows, cells: SessionCells, dtype: torch.dtype) -> None:
        """``start``: first row in the pass. ``base``: first cell of the session's extent in the pool. ``dtype``: of masks."""
        self.start = start
        self.stop = start + len(rows.slots)
        self._base = base
        self._rows = rows
        self._cells = cells
        self._dtype = dtype
        self._first = int(rows.positions[0])
        self._last = int(rows.positions.max())
        self._slice = cells.slice_keys(rows)
        self._keys: dict[int | None, Keys] = {}

    def keys(self, window: int | None) -> Keys:
        """The same for all layers that share a window; ``window`` None: no sliding window."""
        found = self._keys.get(window)
        if found is None:
            active = None if window is not None and self._last < window else window
            found = self._keys[window] = self._plan(active)
        return found

    def _plan(self, window: int | None) -> Keys:
        low = 0 if window is None else max(0, self._first - window + 1)
        if self._slice is None or (window is not None and not self._cells.in_order(low, self._slice)):
            visible = torch.from_numpy(self._cells.visible(self._rows, window))
            mask = torch.zeros(visible.shape, dtype=self._dtype).masked_fill_(visible.logical_not_(), -torch.inf)
            return Keys(self._base, self._base + visible.shape[1], mask)
        rows = len(self._rows.slots)
        causal = None if rows == 1 else causal_mask(rows, self._first - low, window, self._dtype)
        return Keys(self._base + low, self._base + self._first + rows, causal)


class StepAttention:
    """What one pass hands to the attention of every layer."""

    def __init__(self, kv: KvTensors, cells: torch.Tensor, segments: Sequence[Segment]) -> None:
        """``cells``: int64 [rows], the pool cell of each row. ``segments`` cover all rows, in order."""
        self._kv = kv
        self._cells = cells
        self._segments = segments

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Writes keys and values of the rows, then attends: [1, heads, rows, width] to [1, rows, heads, width]."""
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        keys.index_copy_(2, self._cells, key)
        values.index_copy_(2, self._cells, value)
        attend = _attend if scores.softcap is None and scores.sinks is None else _attend_explicit
        parts: list[torch.Tensor] = []
        for segment in self._segments:
            low, high, mask = segment.keys(scores.window)
            rows = query if len(self._segments) == 1 else query[:, :, segment.start : segment.stop]
            parts.append(attend(rows, keys[:, :, low:high], values[:, :, low:high], mask, scores))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scores: Scores
) -> torch.Tensor:
    """[1, heads, rows, width] over [1, kv heads, keys, width]; returns [1, rows, heads, width]."""
    _, heads, rows, width = query.shape
    groups = key.shape[1]
    each = heads // groups
    if rows == 1:
        out = scaled_dot_product_attention(
            query.reshape(1, groups, each, width), key, value, attn_mask=mask, scale=scores.scaling
        )
        return out.reshape(1, 1, heads, -1)
    if rows <= FOLD_ROWS:
        folded = query.reshape(1, groups, each * rows, width)
        if mask is not None:
            mask = mask.repeat(each, 1)
        out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scores.scaling)
        return out.reshape(1, heads, rows, -1).transpose(1, 2)
    keys = key[0, :, None].expand(-1, each, -1, -1)
    values = value[0, :, None].expand(-1, each, -1, -1)
    out = scaled_dot_product_attention(
        query.reshape(groups, each, rows, width), keys, values, attn_mask=mask, scale=scores.scaling
    )
    return out.reshape(1, heads, rows, -1).transpose(1, 2)


def _attend_explicit(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scores: Scores
) -> torch.Tensor:
    """The same with the scores written out, in fp32, for what ``scaled_dot_product_attention`` cannot do."""
    _, heads, rows, width = query.shape
    _, groups, count, _ = key.shape
    grouped = query.reshape(groups, heads // groups, rows, width).float()
    keys, values = key[0].float()[:, None].transpose(2, 3), value[0].float()[:, None]
    parts: list[torch.Tensor] = []
    step = max(1, EXPLICIT_SCORES // (heads * count))
    for start in range(0, rows, step):
        products = grouped[:, :, start : start + step] @ keys * scores.scaling
        if scores.softcap is not None:
            products = torch.tanh(products / scores.softcap) * scores.softcap
        if mask is not None:
            products = products + mask[start : start + step]
        if scores.sinks is not None:
            sinks = scores.sinks.float().view(groups, -1, 1, 1).expand(-1, -1, products.shape[2], 1)
            products = torch.cat([products, sinks], -1)
        parts.append(products.softmax(-1)[..., :count] @ values)
    return torch.cat(parts, 2).reshape(1, heads, rows, -1).transpose(1, 2).to(query.dtype)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    farflung: StepAttention | Watcher,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer; ``farflung`` is the keyword that the layer was handed."""
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    if not isinstance(farflung, StepAttention):
        return farflung.watch(AttentionCall(module, query, key, value, scores, attention_mask, others)), None
    return farflung.attend(module.layer_idx, query, key, value, scores), None


AttentionInterface.register(ATTENTION, _attention)
register_rules(ATTENTION)

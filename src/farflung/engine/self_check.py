"""A stage tries its own recipe before it serves, layer by layer, on seven rows of a made-up text. Two things are tried.

*In pieces*: the text is computed by the stage's own forward, at once, with the attention that transformers brings; and by the
recipe in pieces, with rows of another session between, as packed steps are. This finds a layer that counts positions by itself,
hands attention something else than was understood, or carries much from row to row in another way. The two are different
sums, so only differences well above rounding count: in bf16 a fifth of what the layer adds may pass.

*Alone*: with attention that shows each row nothing but itself, every second row is replaced; the others must stay as they are,
with their queries, keys and values. This finds whatever else mixes rows (a convolution, a state, a shared scale). The sums are
the same, so this is sharp: layers without experts give the same bits, experts round otherwise in other company. Of a layer
that adds a share of the MLP's output at the row before, 0.00002 is found in fp32 and 0.03 in bf16 (of a tiny Llama).

Neither finds what mixes less than that, what begins after seven rows or only far from the positions tried, nor a way of mixing
that happens to leave these rows alone. Values that are not finite are refused. It costs some ten passes of few rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from farflung.core.errors import UnsupportedModel
from farflung.engine.attention import ATTENTION, AttentionCall
from farflung.engine.probe import check_finite, random_rows
from farflung.engine.skeleton import understood

if TYPE_CHECKING:
    from farflung.engine.layer_calls import LayerCall, Recipe
    from farflung.engine.loader import StageModule

_ROWS = 7
_PASSES = (((0, 0), (0, 1), (0, 2)), ((1, 0), (0, 3), (1, 1)), ((0, 4), (1, 2), (0, 5)), ((1, 3), (0, 6)))
"""Rows of each pass, as (session, position). Both sessions are the same text."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Of what a layer adds. Rounding makes some 1e-6 and 1e-2, experts that are chosen otherwise more, in single rows."""
_BAD_SHARE = 1 / 3
_ROUNDING = {torch.float32: 64.0, torch.bfloat16: 2.0}
"""Units in the last place of a row's length by which it may differ in other company. Experts make up to 1.4 in fp32."""


def self_check(stage: StageModule, recipe: Recipe) -> None:
    """Raises UnsupportedModel, naming the first layer that differs."""
    limit = recipe.limit or getattr(stage.config, "max_position_embeddings", None) or 4096
    first = max(0, min(int(limit), 2**16) - 2 * _ROWS)
    positions = first + torch.arange(_ROWS)[None]
    with torch.inference_mode(), understood("a stage"):
        stock = _stock(stage, recipe, positions, first)
        contexts = torch.full((_ROWS,), first + _ROWS)
        embeddings = [rotary(stock[0][0], positions, contexts) for rotary in recipe.rotaries]
        for number, (call, (before, after)) in enumerate(zip(recipe.layers, stock, strict=True), stage.layer_range.start):
            check_finite(after, number)
            found = _in_pieces(call, before, positions, embeddings)
            off = (found - after).float().norm(dim=-1)
            added = (after - before).float().norm(dim=-1)
            rounding = 4 * torch.finfo(after.dtype).eps * after.float().norm(dim=-1)
            bad = ~(off <= _TOLERANCE[stage.dtype] * added + rounding)
            if bad.float().mean() > _BAD_SHARE:
                worst = float((off / added.clamp_min(1e-30)).max())
                raise UnsupportedModel(
                    f"its layer {number} computes something else in pieces than at once (by {worst:.2g} of what it adds): "
                    "it mixes tokens in another way than by attention over their keys and values"
                )
            if not _mixing(call, before, positions, embeddings) <= _ROUNDING[stage.dtype]:
                raise UnsupportedModel(
                    f"its layer {number} computes something else of a token when others than its text change: "
                    "it mixes tokens in another way than by attention over their keys and values"
                )


def _stock(stage: StageModule, recipe: Recipe, positions: torch.Tensor, first: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every layer in the stage's own forward, with transformers' attention."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    past = {call.layer: call.past for call in recipe.layers}

    def tell_past(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        name = past[layer]
        return None if name is None else (args, {**kwargs, name: _Past(first)})

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        seen.append((before.clone(), (output if isinstance(output, torch.Tensor) else output[0]).clone()))

    handles = [layer.register_forward_pre_hook(tell_past, with_kwargs=True) for layer in stage.layers]
    handles += [layer.register_forward_hook(keep, with_kwargs=True) for layer in stage.layers]
    ids = torch.arange(3, 3 + _ROWS)[None] % stage.config.vocab_size
    start = {"input_ids": ids} if stage.is_first else {"inputs_embeds": random_rows(stage, _ROWS)}
    try:
        _use(stage, "eager")
        stage.base(**start, position_ids=positions, use_cache=False)
    finally:
        _use(stage, ATTENTION)
        for handle in handles:
            handle.remove()
    return seen


def _use(stage: StageModule, attention: str) -> None:
    for module in stage.model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = attention


def _in_pieces(call: LayerCall, before: torch.Tensor, positions: torch.Tensor, embeddings: list[Any]) -> torch.Tensor:
    """The layer's output for session 0, row by row as ``_PASSES`` says; NaN for a row of session 1 that differs from it."""
    found = torch.full_like(before, torch.nan)
    other = torch.full_like(before, torch.nan)
    attention = _PlainAttention()
    for rows in _PASSES:
        attention.rows = rows
        index = torch.tensor([row for _, row in rows])
        some = [_rows_of(made, index) for made in embeddings]
        out = call(before[:, index], positions[:, index], attention, some)
        for place, (session, row) in enumerate(rows):
            (found if session == 0 else other)[:, row] = out[:, place]
    return found


def _mixing(call: LayerCall, before: torch.Tensor, positions: torch.Tensor, embeddings: list[Any]) -> float:
    """The most that a row changes with the others where attention shows it none of them, in units in the last place of its
    length: what the layer makes of it, its query, key and value."""
    worst = 0.0
    own = _computed_alone(call, before, positions, embeddings)
    for first in (0, 1):
        changed = before.clone()
        changed[:, first::2] = before.roll(3, 1)[:, first::2]
        same = slice(1 - first, None, 2)
        for one, other in zip(own, _computed_alone(call, changed, positions, embeddings), strict=True):
            off = (one - other)[:, same].float().norm(dim=-1)
            length = one[:, same].float().norm(dim=-1).clamp_min(1e-30)
            worst = max(worst, float((off / length).max()) / torch.finfo(one.dtype).eps)
    return worst


def _computed_alone(
    call: LayerCall, before: torch.Tensor, positions: torch.Tensor, embeddings: list[Any]
) -> list[torch.Tensor]:
    """The layer's output, queries, keys and values, each [1, rows, values]."""
    attention = _OwnRow()
    return [call(before, positions, attention, embeddings), *attention.seen]


class _OwnRow:
    """Attention of each row to itself alone.

    Attributes:
        seen: queries, keys and values, each [1, rows, heads x width].
    """

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def watch(self, call: AttentionCall) -> torch.Tensor:
        """[1, heads, rows, width] to [1, rows, heads, width]."""
        _, query, key, value, *_ = call
        self.seen += [tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value)]
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous()


def _rows_of(made: Any, index: torch.Tensor) -> Any:
    return tuple(part[:, index] for part in made) if isinstance(made, tuple) else made[:, index]


class _PlainAttention:
    """Attention written out over the rows of each session so far: what ``StepAttention`` must equal, in few lines."""

    def __init__(self) -> None:
        self.rows: tuple[tuple[int, int], ...] = ()
        self._keys: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        self._values: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def watch(self, call: AttentionCall) -> torch.Tensor:
        """[1, heads, rows, width] to [1, rows, heads, width]."""
        _, query, key, value, scores, *_ = call
        made: list[torch.Tensor] = []
        each = query.shape[1] // key.shape[1]
        for place, (session, _) in enumerate(self.rows):
            self._keys[session].append(key[0, :, place])
            self._values[session].append(value[0, :, place])
            window = slice(-scores.window if scores.window is not None else None, None)
            keys = torch.stack(self._keys[session][window], 1).repeat_interleave(each, 0).float()
            values = torch.stack(self._values[session][window], 1).repeat_interleave(each, 0).float()
            products = (keys @ query[0, :, place, :, None].float())[..., 0] * scores.scaling
            if scores.softcap is not None:
                products = torch.tanh(products / scores.softcap) * scores.softcap
            if scores.sinks is not None:
                products = torch.cat([products, scores.sinks.float().view(-1, 1)], -1)
            weights = products.softmax(-1)[:, : keys.shape[1]]
            made.append((weights[:, None] @ values)[:, 0])
        return torch.stack(made)[None].to(query.dtype)


class _Past:
    """A cache of ``tokens`` tokens that holds nothing, for layers that only count."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def get_seq_length(self, *_: Any) -> int:
        return self._tokens

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value

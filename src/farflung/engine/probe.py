"""What a probe forward is handed in place of attention and cache: both note what the layers ask of them.

A layer that only calls attention once, on its own keys, can be split, packed and put in trees. Whatever else it does between
tokens - state in a cache, keys of another layer, masks of its own - shows here and makes the family one that is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from farflung.core.errors import UnsupportedModel
from farflung.engine.attention import AttentionCall
from farflung.engine.kv_tensors import KvShape
from farflung.engine.loader import StageModule
from farflung.engine.masks import MaskRule, Reach

_HARMLESS = {"position_ids", "position_embeddings"}
"""Tensors that reach attention only because layers hand all they are given on; rotation is done by then."""


class ProbeAttention:
    """Stands in for ``StepAttention``: returns zeros.

    Attributes:
        shapes: of keys and values, by layer.
        reach: what each layer sees.
        windows: the sliding window each layer names when it calls.
    """

    def __init__(self, rows: int, context: int) -> None:
        self.shapes: dict[int, KvShape] = {}
        self.reach: dict[int, Reach] = {}
        self.windows: dict[int, int | None] = {}
        self.layer = -1
        self._rows = rows
        self._context = context

    def watch(self, call: AttentionCall) -> torch.Tensor:
        """The layer's one call. Raises UnsupportedModel where it is no plain attention over the layer's own keys."""
        module, query, key, value, scores, mask, others = call
        layer = getattr(module, "layer_idx", None)
        if layer != self.layer:
            raise UnsupportedModel(f"its layer {self.layer} attends as if it were layer {layer}")
        if layer in self.shapes:
            raise UnsupportedModel(f"its layer {layer} attends more than once")
        for tensor in (query, key, value):
            if tensor.dim() != 4 or (tensor.shape[0], tensor.shape[2]) != (1, self._rows):
                raise UnsupportedModel(f"its attention is over {list(tensor.shape)} for {self._rows} tokens")
        if key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
            raise UnsupportedModel(f"it has {query.shape[1]} query, {key.shape[1]} key and {value.shape[1]} value heads")
        if strange := [name for name, given in others.items() if _is_array(given) and name not in _HARMLESS]:
            raise UnsupportedModel(f"its attention takes {', '.join(map(repr, strange))}, which is not known here")
        if not isinstance(mask, MaskRule):
            raise UnsupportedModel(f"its attention takes a mask of its own making ({type(mask).__name__})")
        self.reach[layer] = mask.reach(self._context)
        self.windows[layer] = scores.window
        self.shapes[layer] = KvShape(key.shape[1], key.shape[3], value.shape[3])
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))


class ProbeCache:
    """Stands in for a cache that holds nothing.

    Attributes:
        counted: whether its length was asked for.
        touched: whatever else was asked of it: state that we do not keep.
    """

    def __init__(self) -> None:
        self.counted = False
        self.touched: set[str] = set()

    def get_seq_length(self, *_: Any) -> int:
        self.counted = True
        return 0

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            self.touched.add(name)
        raise AttributeError(name)


def random_rows(stage: StageModule, count: int) -> torch.Tensor:
    """Made-up activations [1, count, width], the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, count, stage.config.hidden_size), generator=generator).to(stage.dtype)


def check_finite(made: torch.Tensor, layer: int) -> None:
    """Raises UnsupportedModel where what ``layer`` makes of ordinary rows is not finite."""
    if not bool(made.isfinite().all()):
        raise UnsupportedModel(
            f"its layer {layer} makes values that are not finite",
            hint="its weights are damaged, or the dtype is too narrow for them; try fp32",
        )


def _is_array(value: Any) -> bool:
    return value is not None and not isinstance(value, (bool, int, float, str))

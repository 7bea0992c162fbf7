"""Which earlier positions a layer sees, taken from the mask that transformers would have made for it.

Registered with ``AttentionMaskInterface`` under the name of our attention: a model's forward then gets, in place of a tensor,
the rule itself, which it hands to its layers. The rule is tried at the positions where rules differ, up to the model's whole
context, so that a window of 4,096 is seen although a probe has three rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import AttentionMaskInterface

from farflung.core.errors import UnsupportedModel

_NEAR = 2**16
"""Positions before a query that are compared one by one."""

_OWN_MASKS = "its layers work on the attention mask themselves (attention that is sparse by an index, or written out)"


@dataclass(frozen=True)
class Reach:
    """What a query at position q sees: positions up to q, all of them or the last ``window``.

    Attributes:
        window: positions back, itself included; None: all.
        limit: beyond so many positions a layer does not see what ``window`` says (its attention goes by chunks of that
            length); None: never.
    """

    window: int | None = None
    limit: int | None = None


class MaskRule:
    """Stands where a mask would: ``visible(batch, head, query, key)`` of transformers."""

    def __init__(self, visible: Callable[..., Any]) -> None:
        self._visible = visible

    def to(self, *_: Any, **__: Any) -> MaskRule:
        """Some models move their mask to a device or type first."""
        return self

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedModel(_OWN_MASKS)

    def __getitem__(self, _: object) -> NoReturn:
        raise UnsupportedModel(_OWN_MASKS)

    def __radd__(self, _: object) -> NoReturn:
        raise UnsupportedModel(_OWN_MASKS)

    def reach(self, context: int) -> Reach:
        """For positions below ``context``. Raises UnsupportedModel for a rule that is neither causal, sliding nor in chunks."""
        first_blind = self._first_blind(context)
        if first_blind is None:
            found, length = Reach(), context
        elif self.seen(torch.tensor(first_blind), torch.tensor(first_blind - 1)):
            found, length = Reach(first_blind), first_blind
        else:
            found, length = Reach(limit=first_blind), first_blind
        for query in {0, 1, length - 1, length, length + 1, 2 * length - 1, 2 * length, 2 * length + 3, context - 1}:
            if not 0 <= query < context:
                continue
            keys = torch.cat([torch.arange(min(64, query)), torch.arange(max(0, query - _NEAR), query + 8)])
            expected = keys <= query
            if found.window is not None:
                expected &= keys > query - found.window
            if found.limit is not None:
                expected &= keys // found.limit == query // found.limit
            if not torch.equal(self.seen(torch.tensor(query), keys).expand(keys.shape), expected):
                raise UnsupportedModel(f"its attention is neither causal nor a sliding window at position {query}")
        return found

    def seen(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """bool, shaped as ``keys``."""
        zero = torch.tensor(0)
        seen: torch.Tensor = self._visible(zero, zero, query, keys)
        return seen

    def _first_blind(self, context: int) -> int | None:
        """The first position that does not see position 0."""
        origin = torch.tensor(0)
        if bool(self.seen(torch.tensor(context - 1), origin)):
            return None
        low, high = 0, context - 1
        while low < high:
            middle = (low + high) // 2
            if bool(self.seen(torch.tensor(middle), origin)):
                low = middle + 1
            else:
                high = middle
        return low


def _rule(*_: Any, mask_function: Callable[..., Any], **__: Any) -> MaskRule:
    return MaskRule(mask_function)


def register_rules(name: str) -> None:
    """Masks of models whose attention is called ``name`` are rules from now on."""
    AttentionMaskInterface.register(name, _rule)

"""A stage's linear maps, each by the kernel that ``kernel_plan`` chose, those with the same input by one multiplication."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from farflung.engine.kernel_plan import KernelPlan
from farflung.engine.kernels import Kernel


class KernelLinear(nn.Module):  # type: ignore[misc]
    """In the place of one ``nn.Linear``."""

    def __init__(self, kernel: Kernel, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self._kernel = kernel

    @property
    def nbytes(self) -> int:
        return self._kernel.nbytes

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._kernel(rows)


class _Together:
    """The outputs of several linear maps of one input, until each has taken its own."""

    def __init__(self, kernel: Kernel, outputs: Sequence[int]) -> None:
        self.kernel = kernel
        self._outputs = list(outputs)
        self._rows: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def take(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        part = self._parts[index] if rows is self._rows else None
        if part is None:  # another input, or the same once more
            self._rows = rows
            self._parts = [*self.kernel(rows).split(self._outputs, -1)]
            part = self._parts[index]
        self._parts[index] = None
        if not any(left is not None for left in self._parts):
            self._rows = None
        # Some families view what a linear map returns; of one row this copies nothing.
        return part.contiguous()  # type: ignore[union-attr]


class SharedLinear(nn.Module):  # type: ignore[misc]
    """In the place of one of several ``nn.Linear`` that are given the same rows: the first called multiplies for all.

    Right whatever it is called with, and in whatever order; fast where the others are called next, with the same tensor.
    """

    def __init__(self, together: _Together, index: int, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._together, self._index = together, index

    @property
    def nbytes(self) -> int:
        """Of all that share, at the first of them."""
        return self._together.kernel.nbytes if self._index == 0 else 0

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._together.take(self._index, rows)


def swap_linears(
    module: nn.Module, plan: KernelPlan, groups: Sequence[Sequence[str]] = (), *, is_head: bool = False
) -> nn.Module:
    """Gives every ``nn.Linear`` in ``module`` its kernel, one by one: each plain weight is let go before the next is packed.

    Args:
        module: a layer, or a head that is itself the ``nn.Linear``.
        plan: decides.
        groups: names in ``module`` of those that are given the same rows.
        is_head: whether it makes logits.

    Returns ``module``, or what takes its place.
    """
    if type(module) is nn.Linear:
        return _swapped(module, plan, is_head=is_head)
    for names in groups:
        members = [module.get_submodule(name) for name in names]
        if all(type(member) is nn.Linear for member in members) and len({member.weight.dtype for member in members}) == 1:
            for name, shared in zip(names, _joined(members, plan), strict=True):
                module.set_submodule(name, shared)
        del members
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, _swapped(child, plan, is_head=is_head))
    return module


def _swapped(linear: nn.Linear, plan: KernelPlan, *, is_head: bool) -> nn.Module:
    kernel = plan.kernel(linear.weight.detach(), linear.bias, is_head=is_head)
    return KernelLinear(kernel, linear.in_features, linear.out_features)


def _joined(members: Sequence[nn.Linear], plan: KernelPlan) -> list[SharedLinear]:
    outputs = [member.out_features for member in members]
    weight = torch.cat([member.weight.detach() for member in members])
    bias = None
    if any(member.bias is not None for member in members):
        none = weight.new_zeros
        bias = torch.cat([none(member.out_features) if member.bias is None else member.bias.detach() for member in members])
    together = _Together(plan.kernel(weight, bias), outputs)
    return [SharedLinear(together, index, member) for index, member in enumerate(members)]

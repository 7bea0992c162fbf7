"""How well the layers of a model are served: nodes per layer, and what would have to be added for a route to exist.

A node computes exactly the range it announced, so ranges must *join*: 0:7 and 6:12 cover twelve layers and make no route.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from farflung.core.errors import UsageError
from farflung.core.model import LayerRange


def check_ranges(served: Iterable[LayerRange], layers: int) -> None:
    """Raises UsageError unless ``layers`` is positive and every range ends within it."""
    if layers < 1:
        raise UsageError(f"a model of {layers} layers cannot be served")
    for layer_range in served:
        if layer_range.stop > layers:
            raise UsageError(f"layers {layer_range} end beyond the {layers} layers of the model")


def layer_counts(served: Iterable[LayerRange], layers: int) -> list[int]:
    """Number of nodes that serve each layer, for layers ``0 .. layers - 1``. Raises UsageError."""
    served = tuple(served)
    check_ranges(served, layers)
    steps = [0] * (layers + 1)
    for layer_range in served:
        steps[layer_range.start] += 1
        steps[layer_range.stop] -= 1
    counts: list[int] = []
    for step in steps[:layers]:
        counts.append(step + (counts[-1] if counts else 0))
    return counts


def coverage(served: Iterable[LayerRange], layers: int) -> tuple[tuple[LayerRange, int], ...]:
    """Runs of layers served by the same number of nodes, in order; together they are all layers. Raises UsageError."""
    counts = layer_counts(served, layers)
    edges = [0, *(layer for layer in range(1, layers) if counts[layer] != counts[layer - 1]), layers]
    return tuple((LayerRange(start, stop), counts[start]) for start, stop in itertools.pairwise(edges))


def missing_layers(served: Sequence[LayerRange], layers: int) -> tuple[LayerRange, ...]:
    """The ranges to add, fewest layers in all, so that ranges join from layer 0 to the last; empty where they do already.

    Shortest path over the boundaries of the ranges: a served range costs nothing, an added one its number of layers. Of
    equal ones, that with fewer pieces, then that whose pieces come first. Raises UsageError.
    """
    check_ranges(served, layers)
    boundaries = sorted({0, layers, *(r.start for r in served), *(r.stop for r in served)})
    ending: dict[int, list[int]] = {boundary: [] for boundary in boundaries}
    for layer_range in set(served):
        ending[layer_range.stop].append(layer_range.start)
    best: dict[int, tuple[int, int, tuple[LayerRange, ...]]] = {0: (0, 0, ())}
    for previous, boundary in itertools.pairwise(boundaries):
        options = [best[start] for start in ending[boundary]]
        added, pieces, parts = best[previous]
        if parts and parts[-1].stop == previous:
            joined = (*parts[:-1], LayerRange(parts[-1].start, boundary))
            options.append((added + boundary - previous, pieces, joined))
        else:
            options.append((added + boundary - previous, pieces + 1, (*parts, LayerRange(previous, boundary))))
        best[boundary] = min(options)
    return best[layers][2]

"""Which layers a new node should serve (``--layers auto``)."""

from __future__ import annotations

from collections.abc import Sequence

from farflung.core.errors import UsageError
from farflung.core.model import LayerRange
from farflung.planning.coverage import layer_counts, missing_layers


def choose_layers(existing: Sequence[LayerRange], layers: int, count: int) -> LayerRange:
    """The contiguous layers, at most ``count`` of them, that help most beside the ranges that exist.

    While ranges do not join from the first layer to the last, the first missing piece, from its start: no more than the
    piece, because only ranges that join make a route. After that the least covered ranges between boundaries that exist
    already, so that the new node can stand in for others; of equal ones the longest, then the first.

    Args:
        existing: what other nodes serve.
        layers: layers of the model.
        count: layers that fit this node.

    Raises:
        UsageError: ``count`` below 1, or a range beyond the model.
    """
    if count < 1:
        raise UsageError(f"a node cannot serve {count} layers", hint="at least one layer must fit; give it more memory")
    missing = missing_layers(existing, layers)
    if missing:
        first = missing[0]
        return LayerRange(first.start, min(first.start + count, first.stop))
    counts = layer_counts(existing, layers)
    boundaries = sorted({0, layers, *(r.start for r in existing), *(r.stop for r in existing)})
    aligned = [LayerRange(start, stop) for start in boundaries for stop in boundaries if start < stop <= start + count]
    # Where every piece between boundaries is longer than count, a head of one: another node can add its rest.
    candidates = aligned or [LayerRange(start, start + count) for start in boundaries[:-1]]
    return min(candidates, key=lambda r: (sum(counts[r.start : r.stop]) / len(r), -len(r), r.start))


def is_still_needed(chosen: LayerRange, existing: Sequence[LayerRange], layers: int) -> bool:
    """Whether a node that chose a range some time ago should serve it, beside the ranges that exist by now.

    It should not where others have come to serve all of it meanwhile and other layers are missing: nodes that start together
    choose the same ones. Raises UsageError where a range ends beyond the model.
    """
    missing = missing_layers(existing, layers)
    return not missing or any(gap.start < chosen.stop and chosen.start < gap.stop for gap in missing)

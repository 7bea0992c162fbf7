"""The cheapest route over the nodes that are there: a shortest path over layer boundaries.

What a route costs is the ring time of one decoded token: compute of every stage, the way from the driver to the first
stage, between stages, and from the tail straight back. Costs are whole nanoseconds: the order of adding cannot decide a tie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from farflung.core.errors import LayersMissing, UsageError
from farflung.core.ids import NodeId, short
from farflung.core.model import LayerRange
from farflung.core.route import Hop, Route
from farflung.planning.coverage import check_ranges, missing_layers


@dataclass(frozen=True, kw_only=True)
class StageOffer:
    """What one node offers.

    Attributes:
        node_id: the node; it may offer one range only.
        layers: the range it computes, whole.
        decode_ms: time of a step of one token.
        kv_free_tokens: KV tokens it could lease now.
        round_trip_s: between the driver and this node; None where nobody measured.
        engine_class: results are comparable within a class.
    """

    node_id: NodeId
    layers: LayerRange
    decode_ms: float
    kv_free_tokens: int
    round_trip_s: float | None = None
    engine_class: str = ""


@dataclass(frozen=True, kw_only=True)
class RouteOptions:
    """What a route must keep to.

    Attributes:
        lease_tokens: KV that every node must have free.
        links: measured round trips between nodes, seconds, by (from, to); the other direction stands in where only it is known.
        unmeasured_round_trip_s: what a link nobody measured is taken for: far enough that a measured near one wins.
        mix_classes: allow nodes of different engine classes in one route.
        avoid: nodes that must not be used (lost ones, say).
        model, directory: named in the hint of LayersMissing; empty leaves them out.
    """

    lease_tokens: int = 0
    links: Mapping[tuple[NodeId, NodeId], float] = field(default_factory=lambda: MappingProxyType({}))
    unmeasured_round_trip_s: float = 0.1
    mix_classes: bool = False
    avoid: frozenset[NodeId] = frozenset()
    model: str = ""
    directory: str = ""


_T = TypeVar("_T")

_Label = tuple[int, int, tuple[NodeId, ...]]
"""Cost in ns, hops, nodes so far: compared in this order, which makes the choice deterministic."""


def choose_route(offers: Sequence[StageOffer], layers: int, options: RouteOptions | None = None) -> Route:
    """The cheapest chain of ranges that join from layer 0 to ``layers``; of equal ones the shortest, then by node ids.

    Raises:
        LayersMissing: no such chain; says which layers, who serves what, and how to add them.
        UsageError: an offer beyond the model, or two of one node.
    """
    options = options or RouteOptions()
    check_ranges((offer.layers for offer in offers), layers)
    if len({offer.node_id for offer in offers}) != len(offers):
        raise UsageError("a node offers two ranges")
    usable = [o for o in offers if o.kv_free_tokens >= options.lease_tokens and o.node_id not in options.avoid]
    groups: dict[str, list[StageOffer]] = defaultdict(list)
    for offer in usable:
        groups["" if options.mix_classes else offer.engine_class].append(offer)
    labels = [label for group in groups.values() if (label := _cheapest(group, layers, options)) is not None]
    if not labels:
        raise _layers_missing(offers, usable, groups, layers, options)
    by_id = {offer.node_id: offer for offer in usable}
    return Route(hops=tuple(Hop(node_id, by_id[node_id].layers) for node_id in min(labels)[2]))


def _cheapest(offers: Iterable[StageOffer], layers: int, options: RouteOptions) -> _Label | None:
    """Extends best labels range by range. Ranges only go forward, so the order of their starts is a topological one."""
    unmeasured = _one_way_ns(options.unmeasured_round_trip_s)
    measured_into: dict[NodeId, dict[NodeId, int]] = defaultdict(dict)
    for (source, target), round_trip_s in options.links.items():
        measured_into[source].setdefault(target, _one_way_ns(round_trip_s))
        measured_into[target][source] = _one_way_ns(round_trip_s)
    reached: dict[NodeId, tuple[int, _Label]] = {}  # where a node's range ends, and the best way to there through it
    ending: dict[int, list[_Label]] = defaultdict(list)
    sorted_at: set[int] = set()
    tail_labels: list[_Label] = []
    for offer in sorted(offers, key=lambda o: (o.layers.start, o.node_id)):
        to_driver = unmeasured if offer.round_trip_s is None else _one_way_ns(offer.round_trip_s)
        start = offer.layers.start
        ways: list[_Label] = []
        if start == 0:
            ways.append((to_driver, 0, ()))
        else:
            if start not in sorted_at:  # every range that ends here starts before, so all are known by now
                ending[start].sort()
                sorted_at.add(start)
            measured = measured_into[offer.node_id]
            # The best of all links nobody measured is the first such one; the measured ones are looked at each.
            free = next((label for label in ending[start] if label[2][-1] not in measured), None)
            if free is not None:
                ways.append((free[0] + unmeasured, *free[1:]))
            for source, one_way in measured.items():
                stop, label = reached.get(source, (0, None))
                if label is not None and stop == start:
                    ways.append((label[0] + one_way, *label[1:]))
        if not ways:
            continue
        cost, hops, nodes = min(ways)
        label = (cost + round(offer.decode_ms * 1e6), hops + 1, (*nodes, offer.node_id))
        reached[offer.node_id] = (offer.layers.stop, label)
        ending[offer.layers.stop].append(label)
        if offer.layers.stop == layers:
            tail_labels.append((label[0] + to_driver, *label[1:]))
    return min(tail_labels, default=None)


def _one_way_ns(round_trip_s: float) -> int:
    return round(round_trip_s * 0.5e9)


def _layers_missing(
    offers: Sequence[StageOffer],
    usable: Sequence[StageOffer],
    groups: Mapping[str, Sequence[StageOffer]],
    layers: int,
    options: RouteOptions,
) -> LayersMissing:
    """Names the reason that is nearest to a remedy: no node, no free KV, classes that do not mix."""
    gaps = missing_layers([o.layers for o in usable], layers)
    if not gaps:
        classes = ", ".join(sorted(groups))
        return LayersMissing(
            f"no engine class serves all {layers} layers by itself ({classes}); served are {_who(usable)}",
            hint="allow a route that mixes engine classes, or start nodes of one class (--dtype)",
        )
    wanted = " and ".join(str(gap) for gap in gaps)
    commands = "; ".join(node_command(options.directory, options.model, str(gap)) for gap in gaps)
    if not missing_layers([o.layers for o in offers if o.node_id not in options.avoid], layers):
        short_of = [o for o in offers if o.kv_free_tokens < options.lease_tokens and o.node_id not in options.avoid]
        free = ", ".join(f"{short(o.node_id)} ({o.layers}) has {o.kv_free_tokens}" for o in _first(short_of))
        return LayersMissing(
            f"layers {wanted} have no node with {options.lease_tokens} free KV tokens: {free}",
            hint=f"ask for fewer tokens, wait until sessions end, or add a node: {commands}",
        )
    if not usable:
        return LayersMissing(f"layers {wanted} are missing: no node serves any layer", hint=f"add what is missing: {commands}")
    return LayersMissing(
        f"layers {wanted} of {layers} are missing (ranges must join); served are {_who(usable)}",
        hint=f"add what is missing: {commands}",
    )


def node_command(directory: str, model: str, layers: str) -> str:
    """What to type to add a node; an empty directory or model is left out."""
    given = [("--directory", directory), ("--model", model), ("--layers", layers)]
    return " ".join(["farflung node", *(f"{option} {value}" for option, value in given if value)])


def _who(offers: Iterable[StageOffer]) -> str:
    by_range: dict[LayerRange, list[str]] = defaultdict(list)
    for offer in offers:
        by_range[offer.layers].append(short(offer.node_id))
    return ", ".join(f"{layers} by {' '.join(_first(sorted(nodes)))}" for layers, nodes in _first(sorted(by_range.items())))


def _first(items: Sequence[_T]) -> Sequence[_T]:
    return items[:8]

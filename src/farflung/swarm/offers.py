"""From what nodes announce to what ``planning`` decides over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from farflung.core.errors import NoSuchModel, UsageError
from farflung.core.ids import ModelDigest, NodeId, short
from farflung.core.model import LayerRange
from farflung.planning.coverage import coverage, missing_layers
from farflung.planning.curve import time_ms
from farflung.planning.routes import StageOffer, node_command
from farflung.swarm.links import MeasuredLink
from farflung.swarm.records import NodeRecord

_UNMEASURED_MS_PER_LAYER = 10.0
"""For a node that announced no T-curve: slow enough that any that did is preferred."""


@dataclass(frozen=True)
class ServedModel:
    """A model somebody serves.

    Attributes:
        name, digest, layers: of the model.
        nodes: how many serve it, draining ones apart.
        coverage: runs of layers with the number of nodes that serve them.
        complete: whether ranges join from the first layer to the last.
    """

    name: str
    digest: ModelDigest
    layers: int
    nodes: int
    coverage: tuple[tuple[LayerRange, int], ...]
    complete: bool


def served_models(records: Iterable[NodeRecord]) -> tuple[ServedModel, ...]:
    """Every model in ``records``, by name and digest. A digest has one depth: records that claim another are left out."""
    groups: dict[tuple[str, ModelDigest], list[NodeRecord]] = defaultdict(list)
    for record in records:
        if record.status == "serving":
            groups[record.model, record.digest].append(record)
    found = []
    for (name, digest), group in sorted(groups.items()):
        layers = depth_of(group)
        ranges = ranges_of(group, digest, layers)
        found.append(
            ServedModel(name, digest, layers, len(ranges), coverage(ranges, layers), not missing_layers(ranges, layers))
        )
    return tuple(found)


def find_model(records: Iterable[NodeRecord], model: str, *, directory: str = "") -> ServedModel:
    """The one model named ``model`` (or with that digest). ``directory`` is named in the hint.

    Raises NoSuchModel where nobody serves it, naming what is served; UsageError where several models have that name.
    """
    served = served_models(records)
    found = [one for one in served if model in (one.name, one.digest)]
    if not found:
        names = ", ".join(f"{one.name} ({short(one.digest)})" for one in served[:8]) or "nothing"
        raise NoSuchModel(
            f"nobody serves {model}; served is {names}", hint=f"start a node: {node_command(directory, model, 'auto')}"
        )
    if len({one.digest for one in found}) > 1:
        digests = ", ".join(f"{one.digest} ({one.nodes} nodes)" for one in found[:4])
        raise UsageError(f"{len(found)} different models are called {model}: {digests}", hint="name the one you mean by digest")
    return max(found, key=lambda one: one.nodes)


def offers_of(
    records: Iterable[NodeRecord],
    digest: ModelDigest,
    layers: int,
    *,
    tokens: int = 1,
    round_trips_s: Mapping[NodeId, float] | None = None,
) -> tuple[StageOffer, ...]:
    """What serving nodes of the model offer, by node id.

    Args:
        records: verified ones; those of other models are passed over.
        digest: the model.
        layers: its depth; a record that claims another is passed over too.
        tokens: rows of the step whose time counts (1 is plain decode).
        round_trips_s: between the driver and nodes, as far as measured.
    """
    return tuple(
        StageOffer(
            node_id=record.node_id,
            layers=record.layers,
            decode_ms=_step_ms(record, tokens),
            kv_free_tokens=record.kv_free_tokens,
            round_trip_s=(round_trips_s or {}).get(record.node_id),
            engine_class=record.engine_class,
        )
        for record in sorted(_serving(records, digest, layers), key=lambda record: record.node_id)
    )


def ranges_of(records: Iterable[NodeRecord], digest: ModelDigest, layers: int) -> list[LayerRange]:
    """The ranges that serving nodes of the model hold; arguments as for ``offers_of``."""
    return [record.layers for record in _serving(records, digest, layers)]


def depth_of(records: Sequence[NodeRecord]) -> int:
    """The number of layers most of ``records`` (one at least, of one digest) claim; of equal claims the smaller."""
    claims = [record.model_layers for record in records]
    return min(claims, key=lambda layers: (-claims.count(layers), layers))


def link_round_trips_s(links: Iterable[MeasuredLink]) -> dict[tuple[NodeId, NodeId], float]:
    """Measured round trips by (from, to), as ``RouteOptions.links`` wants them."""
    return {(link.source, link.target): link.round_trip_s for link in links}


def _step_ms(record: NodeRecord, tokens: int) -> float:
    if not record.t_curve_ms:
        return _UNMEASURED_MS_PER_LAYER * len(record.layers)
    return time_ms(record.t_curve_ms, tokens)


def _serving(records: Iterable[NodeRecord], digest: ModelDigest, layers: int) -> Iterator[NodeRecord]:
    """Anybody can sign a record that claims a digest and another depth, so both count."""
    return (r for r in records if r.digest == digest and r.model_layers == layers and r.status == "serving")

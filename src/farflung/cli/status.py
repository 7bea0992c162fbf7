"""``farflung status``: who serves what."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from farflung.cli.admission import SwarmKeyOption, read_swarm_key
from farflung.cli.options import DEFAULT_DIRECTORY, Debug, Directory, Json, examples
from farflung.cli.output import Output, command
from farflung.core.ids import short

if TYPE_CHECKING:
    from farflung.core.model import LayerRange
    from farflung.identity.swarm_key import SwarmKey
    from farflung.swarm.links import MeasuredLink
    from farflung.swarm.records import NodeRecord

app = typer.Typer()

MAP_WIDTH = 48
"""Characters of a layer map; a model with more layers shows several in one."""


@app.command(epilog=examples("farflung status", "farflung status --json | jq .models"))
def status(
    directory: Directory = DEFAULT_DIRECTORY, swarm_key: SwarmKeyOption = "", json: Json = False, debug: Debug = False
) -> None:
    """Show the nodes of a swarm: which layers each one holds, whether every layer is served, and the links between them."""
    with command(json=json, debug=debug) as out:
        records, links = asyncio.run(_ask(directory, read_swarm_key(swarm_key)))
        out.json(
            {
                "directory": directory,
                "nodes": [_node(record) for record in records],
                "coverage": [row for group in _by_model(records) for row in _coverage(group)],
                "models": [_model(group) for group in _by_model(records)],
                "links": [
                    {
                        "from": link.source,
                        "to": link.target,
                        "round_trip_ms": round(link.round_trip_s * 1e3, 3),
                        "bytes_per_s": link.bytes_per_s,
                    }
                    for link in links
                ],
            }
        )
        _show(out, records, links)


async def _ask(url: str, swarm_key: SwarmKey | None) -> tuple[list[NodeRecord], list[MeasuredLink]]:
    from farflung.cli.directory import directory_at

    async with directory_at(url, swarm_key) as directory:
        records = await directory.records()
        links = await directory.links()
    return sorted(records, key=lambda r: (r.model, r.digest, r.layers, r.node_id)), links


def _by_model(records: Sequence[NodeRecord]) -> list[list[NodeRecord]]:
    """Records of one digest together; names are for people and may repeat."""
    groups: dict[str, list[NodeRecord]] = {}
    for record in records:
        groups.setdefault(record.digest, []).append(record)
    return list(groups.values())


def _node(record: NodeRecord) -> dict[str, object]:
    return {
        "id": record.node_id,
        "model": record.model,
        "digest": record.digest,
        "layers": [record.layers.start, record.layers.stop],
        "addresses": list(record.addresses),
        "status": record.status,
        "engine": record.engine_class,
        "codecs": list(record.codecs),
        "kv_tokens": record.kv_tokens,
        "kv_free_tokens": record.kv_free_tokens,
        "t_curve_ms": {str(tokens): round(ms, 3) for tokens, ms in record.t_curve_ms},
        "uplink_bytes_per_s": record.uplink_bytes_per_s,
        "version": record.version,
    }


def _coverage(group: Sequence[NodeRecord]) -> list[dict[str, object]]:
    """Runs of layers served by equally many nodes."""
    from farflung.planning.coverage import coverage

    first, (depth, served) = group[0], _served(group)
    return [
        {"model": first.model, "digest": first.digest, "layers": [layers.start, layers.stop], "nodes": nodes}
        for layers, nodes in coverage(served, depth)
    ]


def _model(group: Sequence[NodeRecord]) -> dict[str, object]:
    from farflung.planning.coverage import missing_layers

    first, (depth, served) = group[0], _served(group)
    missing = missing_layers(served, depth)
    return {
        "name": first.model,
        "family": first.family,
        "digest": first.digest,
        "layers": depth,
        "nodes": len(group),
        "complete": not missing,
        "missing": [[gap.start, gap.stop] for gap in missing],
    }


def _served(group: Sequence[NodeRecord]) -> tuple[int, list[LayerRange]]:
    """Layers of the model, and the ranges that take new sessions."""
    from farflung.swarm.offers import depth_of, ranges_of

    depth = depth_of(group)
    return depth, ranges_of(group, group[0].digest, depth)


def _show(out: Output, records: Sequence[NodeRecord], links: Sequence[MeasuredLink]) -> None:
    from rich.table import Table

    if not records:
        out.print("no nodes yet; add one: farflung node --directory URL --model MODEL")
        return
    for group in _by_model(records):
        model = _model(group)
        missing = ", ".join(f"{start}:{stop}" for start, stop in model["missing"])  # type: ignore[attr-defined]
        state = "every layer is served" if model["complete"] else f"layers {missing} are missing"
        count, _ = _served(group)
        out.print(f"{model['name']}  {count} layers, digest {short(group[0].digest)}: {state}")
        table = Table("node", f"layers 0..{count - 1}", "range", "engine", "1 token", "KV free", "address", box=None)
        for record in group:
            table.add_row(
                short(record.node_id),
                layer_map(record.layers, record.model_layers),
                f"{record.layers}" if record.status == "serving" else f"{record.layers} ({record.status})",
                record.engine_class,
                f"{record.t_curve_ms[0][1]:.1f} ms" if record.t_curve_ms else "",
                f"{record.kv_free_tokens} of {record.kv_tokens}",
                record.addresses[0],
            )
        out.print(table)
    for link in links:
        rate = f", {link.bytes_per_s / 1e6:.1f} MB/s" if link.bytes_per_s else ""
        out.print(f"{short(link.source)} to {short(link.target)}: {link.round_trip_s * 1e3:.1f} ms there and back{rate}")


def layer_map(layers: LayerRange, count: int) -> str:
    """The range drawn on a line: ``#`` where every layer of that place is held, ``+`` where some are, ``.`` elsewhere."""
    width = min(count, MAP_WIDTH)
    drawn = []
    for place in range(width):
        start, stop = place * count // width, max((place + 1) * count // width, place * count // width + 1)
        held = sum(layer in layers for layer in range(start, stop))
        drawn.append("#" if held == stop - start else "+" if held else ".")
    return "".join(drawn)

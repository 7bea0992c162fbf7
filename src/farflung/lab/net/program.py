"""What the emulator is told, as lines of text (``emulator/control.c`` reads them). Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from farflung.lab.net.profiles import LEAST_QUEUE_BYTES, QUEUE_S, Connection
from farflung.lab.net.topology import LabNode, Topology, inner_address, public_address

_SAME_NAME = (
    "up_mbps",
    "down_mbps",
    "jitter_ms",
    "jitter_pct",
    "jitter_distribution",
    "jitter_correlation_ms",
    "loss_pct",
    "loss_burst",
    "keep_order",
    "cut",
)


def program(topology: Topology) -> tuple[str, ...]:
    """Everything from the nodes to the word ``start``."""
    return tuple(_lines(topology))


def _lines(topology: Topology) -> Iterator[str]:
    yield f"mtu {topology.mtu}"
    if topology.seed is not None:
        yield f"seed {topology.seed}"
    for key, value in topology.sysctl:
        yield f"sysctl {key} {value}"
    for index, node in enumerate(topology.nodes):
        nat = node.connection.nat
        behind = f" {nat} {inner_address(index)}" if nat != "none" else ""
        yield f"node {node.name} {public_address(index)}{behind}"
    for node in topology.nodes:
        yield connection_line(node)
    for pair in topology.pairs:
        yield pair_line(pair.a, pair.b, dict(pair.settings))
    yield "start"


def connection_line(node: LabNode) -> str:
    """Sets everything about how a node is connected (but for its NAT, which is there from the start)."""
    connection = node.connection
    words = {
        "label": node.label,
        "access_rtt_ms": connection.rtt_ms / 2,
        "offload": connection.offload,
        "up_queue": queue_bytes(connection.up_mbps, connection.queue_kb),
        "down_queue": queue_bytes(connection.down_mbps, connection.queue_kb),
        **{key: getattr(connection, key) for key in _SAME_NAME},
    }
    return _line(f"set {node.name}", words)


def change_line(name: str, changes: Mapping[str, Any]) -> str:
    """Changes some settings of a running node and leaves the rest. A new rate brings the queue that goes with it."""
    words: dict[str, Any] = {}
    for key, value in changes.items():
        if key == "rtt_ms":
            words["access_rtt_ms"] = value / 2
        elif key in _SAME_NAME:
            words[key] = value
    queue_kb = changes.get("queue_kb")
    for side in ("up", "down"):
        if f"{side}_mbps" in changes or queue_kb is not None:
            words[f"{side}_queue"] = queue_bytes(changes.get(f"{side}_mbps", 0.0), queue_kb)
    return _line(f"set {name}", words)


def pair_line(a: str, b: str, settings: Mapping[str, Any]) -> str:
    """Sets what holds between two nodes, both ways."""
    return _line(f"link {a} {b}", settings)


def queue_bytes(rate_mbps: float, queue_kb: float | None) -> float:
    """What a queue holds in front of a link of that rate."""
    return queue_kb * 1024 if queue_kb is not None else max(LEAST_QUEUE_BYTES, rate_mbps * 125_000 * QUEUE_S)


def full_change(name: str, label: str, connection: Connection) -> str:
    """Gives a running node another profile."""
    return connection_line(LabNode(name, label, connection))


def _line(start: str, words: Mapping[str, Any]) -> str:
    return " ".join([start, *(f"{key}={_text(value)}" for key, value in words.items())])


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.12g}" if isinstance(value, float | int) else str(value)

"""Which nodes an emulated network has, and what lies between them: read from a few words or from a file.

``fiber:2,cable+lossy`` is three nodes, n1 to n3. A file (TOML) says more::

    seed = 1                                  # of jitter and losses
    [defaults]
    loss_pct = 0.1
    [nodes]
    home = "cable+jittery"
    far = { profile = "fiber", rtt_ms = 180, nat = "cone" }
    rack = { profile = "lan", count = 8 }     # rack1 to rack8
    [[pairs]]
    between = ["home", "far"]
    base_rtt_ms = 80                          # on top of both; rtt_ms replaces their sum; loss_pct, cut
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farflung.core.errors import UsageError
from farflung.lab.net.profiles import Connection, check_settings, named_connection

MAX_NODES = 1000
NODES_PER_BLOCK = 250
"""Node i is 10.77.(i / 250).(i mod 250 + 1), so that no address ends in 0 or 255."""

DEFAULT_SYSCTL = (
    ("net.ipv4.tcp_congestion_control", "cubic"),  # what nearly every peer on the internet runs, whatever this machine does
    ("net.ipv4.tcp_no_metrics_save", "1"),  # one run does not teach the next
)
PAIR_KEYS = frozenset({"base_rtt_ms", "rtt_ms", "loss_pct", "cut"})
FILE_KEYS = frozenset({"seed", "mtu", "defaults", "nodes", "pairs", "sysctl"})


@dataclass(frozen=True)
class LabNode:
    """A node: ``label`` says in words how it is connected."""

    name: str
    label: str
    connection: Connection


@dataclass(frozen=True)
class Pair:
    """What holds between two nodes, both ways. ``rtt_ms`` replaces the sum of their shares, ``base_rtt_ms`` adds to it."""

    a: str
    b: str
    settings: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Topology:
    """A whole network. ``sysctl`` is set in every node; ``seed`` None draws one."""

    nodes: tuple[LabNode, ...]
    pairs: tuple[Pair, ...] = ()
    seed: int | None = None
    mtu: int = 1500
    sysctl: tuple[tuple[str, str], ...] = DEFAULT_SYSCTL

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        if not 1 <= len(names) <= MAX_NODES:
            raise UsageError(f"a lab has 1 to {MAX_NODES} nodes, not {len(names)}")
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
                raise UsageError(f"{name[:60]!r} is no name for a node", hint="letters, digits, - and _, at most 40 of them")
        if len(set(names)) < len(names):
            raise UsageError("two nodes of the lab have the same name")
        for pair in self.pairs:
            for name in (pair.a, pair.b):
                if name not in names:
                    raise UsageError(f"a pair names {name[:40]!r}, which is no node of the lab")


def public_address(index: int) -> str:
    """What others see of node ``index``."""
    return f"10.77.{index // NODES_PER_BLOCK}.{index % NODES_PER_BLOCK + 1}"


def inner_address(index: int) -> str:
    """The own address of a node behind NAT."""
    return f"192.168.{index % 250 + 1}.2"


def parse_topology(text: str) -> Topology:
    """The network of ``fiber:2,cable+lossy``. Raises UsageError."""
    nodes: list[LabNode] = []
    for part in text.split(","):
        name, _, count = part.strip().partition(":")
        if count and not count.isdecimal():
            raise UsageError(f"{part[:40]!r}: {count[:20]!r} is no number of nodes", hint="write PROFILE:COUNT, e.g. fiber:2")
        connection = named_connection(name)
        for _ in range(min(int(count or 1), MAX_NODES + 1)):
            nodes.append(LabNode(f"n{len(nodes) + 1}", name, connection))
    return Topology(tuple(nodes))


def read_topology(path: Path) -> Topology:
    """The network that a TOML file describes. Raises UsageError."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from error
    return topology_of(data)


def topology_of(data: Mapping[str, Any]) -> Topology:
    """The network that parsed TOML describes. Raises UsageError."""
    if unknown := sorted(set(data) - FILE_KEYS):
        raise UsageError(f"{unknown[0][:40]!r} is no part of a topology", hint=f"there are {', '.join(sorted(FILE_KEYS))}")
    defaults = check_settings(_table(data, "defaults"))
    nodes = tuple(node for name, spec in _table(data, "nodes").items() for node in _nodes(name, spec, defaults))
    seed, mtu = data.get("seed"), data.get("mtu", 1500)
    if not (seed is None or (isinstance(seed, int) and 0 <= seed < 2**64)):
        raise UsageError(f"seed = {str(seed)[:40]} is no whole number of 64 bits")
    if not (isinstance(mtu, int) and 576 <= mtu <= 65535):
        raise UsageError(f"mtu = {str(mtu)[:40]} is not between 576 and 65535")
    sysctl = dict(DEFAULT_SYSCTL) | {key: str(value) for key, value in _table(data, "sysctl").items()}
    for key, value in sysctl.items():
        if not re.fullmatch(r"net\.[a-z0-9_.]{1,80}", key) or not re.fullmatch(r"[\w. -]{1,90}", value):
            raise UsageError(
                f"sysctl {key[:60]} = {value[:40]!r} cannot be set in a node", hint="only net. settings are a node's own"
            )
    return Topology(nodes, tuple(_pairs(data.get("pairs", []))), seed, mtu, tuple(sysctl.items()))


def _table(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = data.get(key, {})
    if not isinstance(found, Mapping):
        raise UsageError(f"{key} of a topology is a table", hint=f"write [{key}] on a line of its own")
    return found


def _nodes(name: str, spec: object, defaults: Mapping[str, Any]) -> Iterator[LabNode]:
    given = {"profile": spec} if isinstance(spec, str) else spec
    if not isinstance(given, Mapping):
        raise UsageError(f"node {name[:40]!r} is a profile or a table", hint=f'write {name[:40]} = "fiber"')
    label, count = given.get("profile", ""), given.get("count", 0)
    if not isinstance(label, str) or not isinstance(count, int) or not 0 <= count <= MAX_NODES:
        raise UsageError(f"node {name[:40]!r}: profile is a text and count a number up to {MAX_NODES}")
    own = check_settings({key: value for key, value in given.items() if key not in ("profile", "count")})
    connection = dataclasses.replace(named_connection(label) if label else Connection(), **{**defaults, **own})
    if not count:
        yield LabNode(name, label or "custom", connection)
    for index in range(count):
        yield LabNode(f"{name}{index + 1}", label or "custom", connection)


def _pairs(data: object) -> Iterator[Pair]:
    for spec in data if isinstance(data, list) else [data]:
        given: Mapping[str, Any] = spec if isinstance(spec, Mapping) else {}
        between = given.get("between")
        if not (isinstance(between, list) and len(between) == 2 and all(isinstance(name, str) for name in between)):
            raise UsageError("a pair of a topology lacks its two nodes", hint='write between = ["a", "b"] in [[pairs]]')
        settings = {key: value for key, value in given.items() if key != "between"}
        yield Pair(between[0], between[1], check_pair(settings))


def check_pair(settings: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """Settings of a pair of nodes with their right types. Raises UsageError."""
    found = []
    for key, value in settings.items():
        if key not in PAIR_KEYS:
            raise UsageError(f"there is no setting {key[:40]!r} of a pair", hint=f"use one of {', '.join(sorted(PAIR_KEYS))}")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UsageError(f"{key}={str(value)[:40]!r} is no number") from None
        if not (0 <= number < 1e9 or (key == "rtt_ms" and number == -1)):
            raise UsageError(f"{key}={number:g} cannot be set", hint="0 or more; rtt_ms=-1 takes the nodes' own again")
        found.append((key, number))
    return tuple(found)

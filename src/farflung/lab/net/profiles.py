"""What a node's connection to the network is like: profiles, modes, and settings given by hand.

Every figure of a profile is the one between *two nodes of that profile*: fiber to fiber takes 10 ms there and back. A node's
own share is half of it, so fiber to cable takes 5 + 10 ms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from farflung.core.errors import UsageError

NAT_KINDS = ("none", "full-cone", "cone", "symmetric")
"""``cone``: one public port per inner port, open to whom it has sent to (port-restricted). ``full-cone``: open to anybody.
``symmetric``: another public port for each peer."""

DISTRIBUTIONS = ("normal", "lognormal", "pareto")

OFFLOAD_OVER_MBPS = 2000
"""Faster links carry super-packets of 64 KB whole (TSO); packet by packet the emulator would be the bottleneck."""

LEAST_QUEUE_BYTES = 256 * 1024
QUEUE_S = 0.02
"""A queue holds the larger of the two where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How one node is connected.

    Attributes:
        up_mbps, down_mbps: rates of IP bytes; 0 is unlimited. TCP carries some 3.5% less payload.
        rtt_ms: round trip between two such nodes.
        jitter_ms: standard deviation of that round trip (a direction has 1/sqrt(2) of it); ``jitter_pct`` the same in % of it.
        jitter_distribution: ``normal`` (cut off at 0), or ``lognormal``, ``pareto`` with longer tails.
        jitter_correlation_ms: packets closer together than this share their delay, as behind a real queue; 0 draws each anew.
        loss_pct: lost per direction between two such nodes; ``loss_burst`` is the mean number lost in a row.
        keep_order: packets of a pair never overtake each other.
        queue_kb: what a queue holds, in front of the uplink and of the downlink; None: 256 KB, and at least 20 ms at the rate.
        nat: one of ``NAT_KINDS``.
        cut: off the network.
    """

    up_mbps: float = 0.0
    down_mbps: float = 0.0
    rtt_ms: float = 0.0
    jitter_ms: float = 0.0
    jitter_pct: float = 0.0
    jitter_distribution: str = "normal"
    jitter_correlation_ms: float = 20.0
    loss_pct: float = 0.0
    loss_burst: float = 1.0
    keep_order: bool = True
    queue_kb: float | None = None
    nat: str = "none"
    cut: bool = False

    @property
    def total_jitter_ms(self) -> float:
        """Standard deviation of the round trip between two such nodes."""
        return self.jitter_ms + self.rtt_ms * self.jitter_pct / 100

    @property
    def offload(self) -> bool:
        return all(not rate or rate > OFFLOAD_OVER_MBPS for rate in (self.up_mbps, self.down_mbps))


PROFILES: Mapping[str, Connection] = MappingProxyType(
    {
        "infiniband": Connection(),  # 200 Gbps: not limited
        "lan": Connection(up_mbps=1000, down_mbps=1000, rtt_ms=0.5),
        "fiber": Connection(up_mbps=100, down_mbps=1000, rtt_ms=10),
        "cable": Connection(up_mbps=20, down_mbps=200, rtt_ms=20),
        "5g": Connection(up_mbps=20, down_mbps=100, rtt_ms=30),
        "intercontinental": Connection(up_mbps=100, down_mbps=1000, rtt_ms=100, jitter_ms=20),
    }
)

MODES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "jittery": {"jitter_ms": 0.0, "jitter_pct": 50.0, "jitter_distribution": "lognormal"},
        "lossy": {"loss_pct": 0.5},
    }
)

_KINDS = {field.name: str(field.type) for field in dataclasses.fields(Connection)}


def named_connection(name: str) -> Connection:
    """The connection of ``fiber`` or ``cable+jittery+lossy``. Raises UsageError."""
    profile, *modes = name.split("+")
    if profile not in PROFILES:
        raise UsageError(f"there is no network profile {profile[:40]!r}", hint=f"use one of {', '.join(PROFILES)}")
    for mode in modes:
        if mode not in MODES:
            raise UsageError(f"there is no mode {mode[:40]!r}", hint=f"a profile goes with +{' or +'.join(MODES)}")
    settings = {key: value for mode in modes for key, value in MODES[mode].items()}
    return dataclasses.replace(PROFILES[profile], **settings)


def parse_settings(words: Iterable[str]) -> dict[str, Any]:
    """The settings of ``up_mbps=1 rtt_ms=400``. Raises UsageError."""
    pairs = [word.partition("=") for word in words]
    for key, equals, _ in pairs:
        if not equals:
            raise UsageError(f"{key[:40]!r} is no setting", hint="write KEY=VALUE, e.g. rtt_ms=400")
    return check_settings({key: value for key, _, value in pairs})


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with their right types, from a file or a command line. Raises UsageError."""
    return {key: _checked(key, value) for key, value in settings.items()}


def _checked(key: str, value: Any) -> Any:
    if key not in _KINDS:
        raise UsageError(f"there is no setting {key[:40]!r} of a connection", hint=f"use one of {', '.join(_KINDS)}")
    if key in ("nat", "jitter_distribution"):
        known = NAT_KINDS if key == "nat" else DISTRIBUTIONS
        if value not in known:
            raise UsageError(f"{key}={str(value)[:40]!r} is unknown", hint=f"use one of {', '.join(known)}")
        return value
    if _KINDS[key] == "bool":
        if str(value).lower() not in ("1", "0", "true", "false"):
            raise UsageError(f"{key}={str(value)[:40]!r} is neither 1 nor 0")
        return str(value).lower() in ("1", "true")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < 1e9 or (key == "loss_pct" and number > 100) or (key == "loss_burst" and number < 1):
        raise UsageError(
            f"{key}={str(value)[:40]!r} is no number that can be set", hint="numbers are 0 or more; loss_burst is 1 or more"
        )
    return number

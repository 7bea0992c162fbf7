"""Does the emulator do what it was asked? Round trip, jitter, loss and rate of a profile, measured from inside two nodes.

The first half of the module is pure: what is asked for, and how near a measurement has to come.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev, quantiles
from typing import Any

from farflung.core.errors import LabError
from farflung.lab.net.lab import Lab
from farflung.lab.net.profiles import Connection, named_connection
from farflung.lab.net.topology import LabNode, Topology

TCP_SHARE = 1448 / 1500
"""Payload of a full packet (20 bytes IP, 32 bytes TCP with timestamps)."""

UNLIMITED_MBPS = 500.0
"""What an unlimited link must carry at the least: the machine's own speed, whatever else it does."""

PACKETS = 160
PROBE = (sys.executable, "-m", "farflung.lab.net.probe")


@dataclass(frozen=True)
class Figure:
    """One thing that was asked for, and what was measured."""

    name: str
    asked: float
    measured: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return abs(self.measured - self.asked) <= self.tolerance


@dataclass(frozen=True)
class Measured:
    """What the probes found. ``tcp_mbps`` is payload; ``udp_mbps`` what arrives of a flood, IP bytes (None: not tried)."""

    times_ms: Sequence[float]
    sent: int
    tcp_mbps: float
    udp_mbps: float | None


def judge(connection: Connection, measured: Measured) -> list[Figure]:
    """Every figure beside what was asked.

    Where there is no jitter the median counts, and its distance from the 5th percentile: a busy machine wakes a probe late now
    and then, and that is not the network's doing. With jitter, mean and standard deviation, within what a sample of some
    hundred correlated packets allows.
    """
    times, jitter = list(measured.times_ms), connection.total_jitter_ms
    if len(times) < 10:
        return [Figure("packets_back", measured.sent, len(times), measured.sent / 2)]
    steps = quantiles(times, n=100)
    centre, spread = (fmean(times), pstdev(times)) if jitter else (median(times), median(times) - steps[4])
    loss = 1 - (1 - connection.loss_pct / 100) ** 2
    lost = 1 - len(times) / measured.sent
    return [
        Figure("rtt_ms", connection.rtt_ms, centre, 0.6 + 0.02 * connection.rtt_ms + 0.25 * jitter),
        Figure("jitter_ms", jitter, spread, 1.0 + 0.35 * jitter),
        Figure("lost_pct", 100 * loss, 100 * lost, 0.3 + 400 * (loss * (1 - loss) / measured.sent) ** 0.5),
        _rate(connection, measured),
    ]


def _rate(connection: Connection, measured: Measured) -> Figure:
    """TCP where nothing disturbs it; else a flood: there TCP tells of congestion control, not of the link."""
    rates = [rate for rate in (connection.up_mbps, connection.down_mbps) if rate]
    if not rates:
        return Figure("rate_mbps", UNLIMITED_MBPS, min(measured.tcp_mbps, UNLIMITED_MBPS), 0.0)
    if measured.udp_mbps is not None:
        return Figure("rate_mbps", min(rates), measured.udp_mbps, 0.05 * min(rates))
    return Figure("rate_mbps", TCP_SHARE * min(rates), measured.tcp_mbps, 0.06 * min(rates))


async def check_profile(name: str, seconds: float = 4.0) -> tuple[list[Figure], dict[str, Any]]:
    """Measures a profile; its figures, and beside them the TCP rate and how punctual the emulator was.

    Raises:
        LabUnavailable: this machine cannot have a network of its own.
        LabError: a probe failed.
    """
    connection = named_connection(name)
    topology = Topology(tuple(LabNode(node, name, connection) for node in ("n1", "n2")), seed=1)
    async with Lab(topology) as lab:
        server = await lab.start("n2", [*PROBE, "serve", lab.address("n2")], name="the probe's server")
        ports = await server.event(30)
        await lab.reset_stats()
        measured = await _measure(lab, connection, ports, seconds)
        emulator = (await lab.stats())["emulator"]
    also = {"tcp_mbps": round(measured.tcp_mbps, 1), "scheduling": emulator["scheduling"], "late_us": emulator["late_us_mean"]}
    return judge(connection, measured), also


async def _measure(lab: Lab, connection: Connection, ports: dict[str, Any], seconds: float) -> Measured:
    # With jitter farther apart than delays are alike, and than one late packet holds back the next.
    gap_s = max(0.03, connection.total_jitter_ms * 2.5e-3) if connection.total_jitter_ms else 0.01
    address, udp, tcp = lab.address("n2"), str(ports["udp"]), str(ports["tcp"])
    echoes = await _probe(lab, "n1", "rtt", address, udp, str(PACKETS), str(gap_s))
    stream = await _probe(lab, "n1", "tcp", address, tcp, str(seconds))
    flood = None
    rates = [rate for rate in (connection.up_mbps, connection.down_mbps) if rate]
    if rates and (connection.total_jitter_ms or connection.loss_pct):
        flood = await _flood(lab, ["udp", address, udp, str(seconds), str(1.2 * min(rates))], seconds)
        flood /= 1 - connection.loss_pct / 100  # the link carried what was lost behind it
    return Measured(echoes["times_ms"], echoes["sent"], stream["mbps"], flood)


async def _flood(lab: Lab, words: Sequence[str], seconds: float) -> float:
    """What arrives of a flood in Mbps, by the kernel's count between two moments inside it."""
    flood = await lab.start("n1", [*PROBE, *words], name="the probe's flood")
    await asyncio.sleep(seconds * 0.35)
    before = await _probe(lab, "n2", "count")
    await asyncio.sleep(seconds * 0.35)
    after = await _probe(lab, "n2", "count")
    await flood.event(seconds + 30)
    return float((after["bytes"] - before["bytes"]) * 8e-6 / (after["at_s"] - before["at_s"]))


async def _probe(lab: Lab, node: str, *words: str) -> dict[str, Any]:
    process = await lab.start(node, [*PROBE, *words], name=f"the probe's {words[0]}")
    try:
        return await process.event(60)
    except LabError as error:
        raise LabError(f"the check could not measure: {error.message}", hint=error.hint) from error

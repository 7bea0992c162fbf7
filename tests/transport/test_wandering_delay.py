"""Jitter that has a memory: the delays of a burst are alike, those of distant windows are not."""

from __future__ import annotations

import random
from itertools import pairwise
from statistics import fmean, stdev

import pytest

from farflung.core.ids import NodeId
from farflung.transport.memory import LinkShape, MemoryNetwork
from farflung.transport.memory_wire import Path, Pipe


def delays(every_s: float, count: int = 4000) -> list[float]:
    path = Path(LinkShape(delay_s=0.05, jitter_std_s=0.014, jitter_memory_s=0.02), random.Random(3))
    ideal = Pipe(None)
    return [path.arrival(n * every_s, ideal, 1000, 0.0) - n * every_s for n in range(count)]


def test_delays_vary_around_the_mean_by_the_deviation_asked() -> None:
    apart = delays(1.0)
    assert fmean(apart) == pytest.approx(0.05, rel=0.02)
    assert stdev(apart) == pytest.approx(0.014, rel=0.05)
    assert min(apart) >= 0


def test_a_burst_shares_its_delay() -> None:
    near, far = delays(0.001), delays(0.5)
    assert stdev(b - a for a, b in pairwise(near)) == pytest.approx(0.014 * (2 * (1 - 0.951)) ** 0.5, rel=0.1)
    assert stdev(b - a for a, b in pairwise(far)) == pytest.approx(0.014 * 2**0.5, rel=0.1)


def test_a_network_can_be_told_the_shape_of_each_path_when_it_is_first_used() -> None:
    asked: list[tuple[NodeId, NodeId]] = []

    def shape_of(a: NodeId, b: NodeId) -> LinkShape:
        asked.append((a, b))
        return LinkShape(delay_s=0.1)

    network = MemoryNetwork(random.Random(1), shape_of=shape_of)
    assert not asked
    one, two = NodeId("1" * 64), NodeId("2" * 64)
    network.silence(one, two)
    network.heal(one, two)
    assert asked == [(one, two), (two, one)]

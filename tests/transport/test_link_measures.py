from __future__ import annotations

import pytest

from farflung.core.errors import UsageError
from farflung.transport.address import format_address, parse_address
from farflung.transport.measure import DeliveryRate, RoundTrip, fragment_bytes_for


def test_the_round_trip_is_the_least_of_the_recent_ones() -> None:
    trips = RoundTrip()
    assert trips.seconds is None
    for index, seconds in enumerate((0.3, 0.1, 0.2)):
        trips.pong(trips.ping(float(index)), index + seconds)
    assert trips.seconds == pytest.approx(0.1)
    for index in range(8):
        trips.pong(trips.ping(10.0 + index), 10.5 + index)
    assert trips.seconds == pytest.approx(0.5)


def test_pongs_to_no_ping_of_ours_measure_nothing() -> None:
    trips = RoundTrip()
    number = trips.ping(0.0)
    trips.pong(number + 7, 1.0)
    assert trips.seconds is None
    trips.pong(number, 1.0)
    trips.pong(number, 0.0)
    assert trips.seconds == 1.0
    forgotten = trips.ping(2.0)
    for _ in range(8):
        trips.ping(3.0)
    trips.pong(forgotten, 2.1)
    assert trips.seconds == 1.0


def test_a_burst_measures_the_rate_without_its_first_read() -> None:
    rate = DeliveryRate()
    for index in range(11):
        rate.arrived(index * 0.01, 10_000, mid_frame=index < 10)
    assert rate.bytes_per_s == pytest.approx(1_000_000)


def test_small_frames_and_pauses_between_them_measure_nothing() -> None:
    rate = DeliveryRate()
    for index in range(100):
        rate.arrived(index * 0.1, 9_000, mid_frame=False)
    rate.arrived(20.0, 9_000, mid_frame=True)
    rate.arrived(20.1, 9_000, mid_frame=False)
    assert rate.bytes_per_s == 0


def test_the_best_of_the_recent_bursts_counts() -> None:
    rate = DeliveryRate()
    for start, seconds in ((0.0, 0.4), (10.0, 0.1), (20.0, 0.2)):
        rate.arrived(start, 1000, mid_frame=True)
        rate.arrived(start + seconds, 100_000, mid_frame=False)
    assert rate.bytes_per_s == pytest.approx(1_000_000)


@pytest.mark.parametrize(
    ("bytes_per_s", "fragment"),
    [
        (None, 16384),
        (0.0, 16384),
        (1e9, 16384),
        (float("inf"), 16384),
        (8.2e6, 16384),
        (8.0e6, 8192),
        (1.25e6, 2048),
        (1e4, 1024),
        (1.0, 1024),
    ],
)
def test_a_fragment_takes_two_milliseconds_within_limits(bytes_per_s: float | None, fragment: int) -> None:
    assert fragment_bytes_for(bytes_per_s) == fragment


@pytest.mark.parametrize("text", ["127.0.0.1:80", "node.example:0", "[::1]:65535", "[fe80::1%eth0]:1"])
def test_addresses_survive_parsing(text: str) -> None:
    assert format_address(*parse_address(text)) == text


NO_ADDRESSES = ["", "host", "host:", ":80", "host:65536", "::1:80", "[::1]", "http://host:80", "a b:1", "host:\u0661"]
NO_NAMES = ["a..b:1", f"{64 * 'x'}.example:1", "\0:1", "\udc80:1", "[\udc80]:1"]  # sockets raise ValueError for these


@pytest.mark.parametrize("text", [*NO_ADDRESSES, *NO_NAMES], ids=ascii)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)

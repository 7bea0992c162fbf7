"""How often each stranger may do a thing. Pure: the time is passed in."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

_SOURCES_REMEMBERED = 4096
"""Forgetting the one that was quiet longest only lets it be quick again."""


class TokenBucket:
    """``burst`` at once, ``per_s`` for long.

    Args:
        now: any monotonic time, as for ``take``.
    """

    def __init__(self, burst: float, per_s: float, now: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._left = burst
        self._at = now

    def take(self, now: float) -> bool:
        """One more, at ``now``; false where none is left."""
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Rates:
    """A bucket for each source (``source_of``)."""

    def __init__(self, burst: float, per_s: float) -> None:
        self.per_s = per_s
        self._burst = burst
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def take(self, source: str, now: float) -> bool:
        """One more of that source; false where it was too quick."""
        bucket = self._buckets.get(source)
        if bucket is None:
            bucket = self._buckets[source] = TokenBucket(self._burst, self.per_s, now)
            if len(self._buckets) > _SOURCES_REMEMBERED:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(source)
        return bucket.take(now)


def source_of(host: str) -> str:
    """What stands for whoever talks from ``host``: an IPv4 address, or the /64 of an IPv6 one, as it is given to a customer
    (RFC 6177); the host itself where it is no address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))

"""What a link stands on: a reliable, ordered stream of bytes to one authenticated peer."""

from __future__ import annotations

from typing import Protocol

FLUSH_S = 1.0
"""How long ``close`` waits for queued frames and for the other end to take them."""

RECORD_BYTES = 22
"""What TLS 1.3 adds to each record: header 5, content type 1, tag 16 (RFC 8446, 5.2)."""


class Wire(Protocol):
    """A byte stream to an authenticated peer, written to by one link."""

    @property
    def writable(self) -> bool:
        """Little is unsent. Once false it stays so until the wire calls ``FrameLink.on_writable``."""

    def write(self, data: bytes) -> int:
        """Sends; never raises. Returns the bytes this puts on the network, encryption included."""

    def bound_unsent(self, size: int) -> None:
        """Asks that at most about ``size`` bytes wait in the kernel."""

    def finish(self, by: float) -> None:
        """Lets what was written arrive, then ends; breaks off at ``by`` (loop time)."""

    async def ended(self) -> None:
        """Returns once nothing is left of the wire."""

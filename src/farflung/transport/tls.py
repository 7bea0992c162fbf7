"""TLS 1.3 between bytes and bytes, without I/O.

Why not asyncio's own TLS transport: it buffers another 64 KiB between the link and the socket, behind which an urgent frame
would wait; it logs every failed handshake to stderr; and it does not tell how many bytes it wrote.
"""

from __future__ import annotations

import contextlib
import ssl

from farflung.core.ids import NodeId
from farflung.identity import peer_node_id

_RECORD_BYTES = 16 * 1024  # largest plaintext of a record


class TlsStream:
    """One end of a TLS connection. Methods raise ``ssl.SSLError`` where the peer breaks TLS or its certificate is refused.

    Args:
        context: of ``identity.server_context`` or ``client_context``.
        server_side: this end accepted.
    """

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self.peer_said_goodbye = False

    @property
    def peer(self) -> NodeId:
        """Valid once the handshake is done. Raises IdentityError."""
        return peer_node_id(self._ssl)

    def feed(self, data: memoryview) -> None:
        """Bytes from the network."""
        self._incoming.write(data)

    def take_outgoing(self) -> bytes:
        """Bytes for the network that have gathered: handshake, alerts, key updates."""
        return self._outgoing.read() if self._outgoing.pending else b""

    def shake_hands(self) -> bool:
        """Goes on with the handshake as far as the bytes allow; true when it is done."""
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def read(self) -> list[bytes]:
        """The plaintext of all whole records that were fed, one item each."""
        chunks: list[bytes] = []
        while self._incoming.pending or self._ssl.pending():
            try:
                chunk = self._ssl.read(_RECORD_BYTES)
            except ssl.SSLWantReadError:
                break
            if not chunk:
                self.peer_said_goodbye = True
                break
            chunks.append(chunk)
        return chunks

    def encrypt(self, data: bytes) -> bytes:
        """The records that carry ``data``, after whatever else is outgoing."""
        self._ssl.write(data)
        return self._outgoing.read()

    def goodbye(self) -> bytes:
        """The records that end the stream in order (close_notify)."""
        # It raises because it wants the peer's goodbye, which nobody waits for, or because the stream is broken already.
        with contextlib.suppress(ssl.SSLError):
            self._ssl.unwrap()
        return self._outgoing.read()

"""Who a node is: an Ed25519 key, what it signs, and the certificates that carry it through TLS."""

from farflung.identity.certificates import client_context, peer_node_id, server_context
from farflung.identity.keys import Identity, verify

__all__ = ["Identity", "client_context", "peer_node_id", "server_context", "verify"]

"""Who a node is: an Ed25519 key, what it signs, the certificates that carry it through TLS, and the key of a private swarm."""

from farflung.identity.certificates import client_context, peer_node_id, server_context
from farflung.identity.keys import Identity, verify
from farflung.identity.swarm_key import SwarmKey

__all__ = ["Identity", "SwarmKey", "client_context", "peer_node_id", "server_context", "verify"]

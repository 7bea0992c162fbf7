"""What the two ends of a link say first, and whether they understand each other."""

from __future__ import annotations

from farflung.core.errors import VersionMismatch
from farflung.core.ids import NodeId, short
from farflung.core.messages import Hello
from farflung.wire.codec import CODEC_NAMES
from farflung.wire.frame import PROTOCOL_VERSION

HELLO = Hello(versions=(PROTOCOL_VERSION, PROTOCOL_VERSION), codecs=CODEC_NAMES)
"""What this release speaks; all its codecs are mandatory."""


def check_versions(ours: Hello, theirs: Hello, peer: NodeId) -> None:
    """Raises VersionMismatch, with both ranges, where no protocol version is in both."""
    if max(ours.versions[0], theirs.versions[0]) > min(ours.versions[1], theirs.versions[1]):
        raise VersionMismatch(
            f"node {short(peer)} speaks protocol versions {theirs.versions[0]} to {theirs.versions[1]}, "
            f"this one {ours.versions[0]} to {ours.versions[1]}",
            hint="update farflung on the " + ("other end" if theirs.versions[1] < ours.versions[0] else "machine you are on"),
        )

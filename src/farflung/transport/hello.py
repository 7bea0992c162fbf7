"""What the two ends of a link say first, and whether they understand each other.

A hello has a range of protocol versions (one must be common), the codecs known (``wire.codec.MANDATORY_CODECS`` are among
them), and feature bits: words for what may be used beyond the version. A feature is used on a link only where both ends name
it, and one that is not known is not an error: it belongs to a newer release.
"""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from farflung.core.errors import VersionMismatch
from farflung.core.ids import NodeId, short
from farflung.core.messages import Hello
from farflung.wire.codec import CODEC_NAMES
from farflung.wire.frame import PROTOCOL_VERSION

RESUME = "resume"
"""A broken line is taken up again: ``Open.asks_have``, ``Have``, resending, ``Trouble``."""

TIMELINE = "timeline"
"""Windows carry ``timeline`` where the driver asks for it, and stages add to it."""

LOGPROBS = "logprobs"
"""Answers carry ``logprobs`` where the session asks for them."""

FEATURES = (RESUME, TIMELINE, LOGPROBS)
"""Of this release."""

HELLO = Hello(versions=(PROTOCOL_VERSION, PROTOCOL_VERSION), features=FEATURES, codecs=CODEC_NAMES)
"""What this release speaks."""


def hello_with(codecs: Collection[str]) -> Hello:
    """The hello of a node that takes only some codecs."""
    return replace(HELLO, codecs=tuple(name for name in CODEC_NAMES if name in codecs))


def common_features(ours: Hello, theirs: Hello) -> frozenset[str]:
    """What may be used between two ends beyond their version."""
    return frozenset(ours.features) & frozenset(theirs.features)


def check_versions(ours: Hello, theirs: Hello, peer: NodeId) -> None:
    """Raises VersionMismatch, with both ranges, where no protocol version is in both."""
    if max(ours.versions[0], theirs.versions[0]) > min(ours.versions[1], theirs.versions[1]):
        raise VersionMismatch(
            f"node {short(peer)} speaks protocol versions {theirs.versions[0]} to {theirs.versions[1]}, "
            f"this one {ours.versions[0]} to {ours.versions[1]}",
            hint="update farflung on the " + ("other end" if theirs.versions[1] < ours.versions[0] else "machine you are on"),
        )

"""``host:port`` and back; IPv6 hosts stand in brackets (RFC 3986, 3.2.2)."""

from __future__ import annotations

import re

from farflung.core.errors import UsageError

_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:\[\]\s/]+)):(?P<port>\d{1,5})")


def parse_address(text: str) -> tuple[str, int]:
    """Host and port. Raises UsageError."""
    match = _ADDRESS.fullmatch(text)
    if not match or int(match["port"]) > 65535:
        raise UsageError(f"{text[:200]!r} is no address", hint="write host:port, e.g. 192.0.2.7:4433 or [2001:db8::7]:4433")
    return match["v6"] or match["host"], int(match["port"])


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

"""``host:port`` and back; IPv6 hosts stand in brackets (RFC 3986, 3.2.2)."""

from __future__ import annotations

import re

from farflung.core.errors import UsageError

_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:\[\]\s/\0]+)):(?P<port>[0-9]{1,5})")


def parse_address(text: str) -> tuple[str, int]:
    """Host and port. Raises UsageError."""
    match = _ADDRESS.fullmatch(text)
    if match and _is_encodable(host := match["v6"] or match["host"]) and (port := int(match["port"])) <= 65535:
        return host, port
    raise UsageError(f"{text[:200]!r} is no address", hint="write host:port, e.g. 192.0.2.7:4433 or [2001:db8::7]:4433")


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_encodable(host: str) -> bool:
    """As sockets encode names: no empty label, none over 63 bytes. They raise ValueError and not OSError for such."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True

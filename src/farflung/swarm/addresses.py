"""``host:port`` as nodes announce it and servers listen on it."""

from __future__ import annotations

import ipaddress
import re

from farflung.core.errors import UsageError

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\.?")
_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45})\]|(?P<host>[^\[\]:\s]{1,253})):(?P<port>[0-9]{1,5})")


def split_address(text: str) -> tuple[str, int]:
    """``"host:port"`` or ``"[v6]:port"`` to the bare host and the port (0 to 65535). Raises UsageError."""
    match = _ADDRESS.fullmatch(text)
    port = int(match["port"]) if match else -1
    if match is None or port > 65535 or not _is_host(match["host"], match["six"]):
        raise UsageError(f"{text[:80]!r} is not an address", hint="write host:port, e.g. 192.0.2.7:7400 or [2001:db8::7]:7400")
    return match["host"] or match["six"], port


def can_be_dialled(text: str) -> bool:
    """Whether ``text`` is an address at which others may find somebody: not port 0, not 0.0.0.0 or [::]."""
    try:
        host, port = split_address(text)
    except UsageError:
        return False
    try:
        return port > 0 and not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return port > 0


def _is_host(host: str | None, six: str | None) -> bool:
    try:
        if six is not None:
            return ipaddress.ip_address(six).version == 6
        if host is not None and re.fullmatch(r"[0-9.]+", host):
            return ipaddress.ip_address(host).version == 4
    except ValueError:
        return False
    return host is not None and _NAME.fullmatch(host) is not None

"""Addresses that strangers announce: stricter than ``transport.address``, which reads what the user of this machine wrote."""

from __future__ import annotations

import ipaddress
import re

from farflung.core.errors import UsageError
from farflung.transport.address import parse_address

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\.?")
_MAX_CHARACTERS = 260


def split_address(text: str) -> tuple[str, int]:
    """``"host:port"`` or ``"[v6]:port"`` to an IP address or DNS name and a port (0 to 65535). Raises UsageError."""
    host, port = parse_address(text[:_MAX_CHARACTERS])
    if len(text) > _MAX_CHARACTERS or not (_is_ip(host) if text.startswith("[") else _is_ip(host) or _is_name(host)):
        raise UsageError(f"{text[:80]!r} names no host", hint="write host:port, e.g. 192.0.2.7:4433 or [2001:db8::7]:4433")
    return host, port


def can_be_dialled(text: str) -> bool:
    """Whether others may find somebody at ``text``: not port 0, not 0.0.0.0 or [::], no interface of one machine."""
    try:
        host, port = split_address(text)
    except UsageError:
        return False
    return port > 0 and "%" not in host and not (_is_ip(host) and ipaddress.ip_address(host).is_unspecified)


def _is_name(host: str) -> bool:
    return _NAME.fullmatch(host) is not None and not re.fullmatch(r"[0-9.]+", host)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

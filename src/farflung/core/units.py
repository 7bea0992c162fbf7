"""Quantities that carry their unit."""

from __future__ import annotations


class Bytes(int):
    """A number of bytes that prints itself for people: ``str(Bytes(1536)) == '1.5 KiB'``."""

    __slots__ = ()

    def __str__(self) -> str:
        size = float(int(self))
        for unit in ("B", "KiB", "MiB", "GiB"):
            if abs(size) < 1024:
                return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
            size /= 1024
        return f"{size:.1f} TiB"

"""Quantities that carry their unit."""

from __future__ import annotations


class Bytes(int):
    """A number of bytes that prints itself for people: ``str(Bytes(1536)) == '1.5 KiB'``."""

    __slots__ = ()

    @classmethod
    def from_kib(cls, kib: float) -> Bytes:
        return cls(int(kib * 1024))

    @classmethod
    def from_mib(cls, mib: float) -> Bytes:
        return cls(int(mib * 1024**2))

    @classmethod
    def from_gib(cls, gib: float) -> Bytes:
        return cls(int(gib * 1024**3))

    @property
    def mib(self) -> float:
        return int(self) / 1024**2

    @property
    def gib(self) -> float:
        return int(self) / 1024**3

    def __str__(self) -> str:
        size = float(int(self))
        for unit in ("B", "KiB", "MiB", "GiB"):
            if abs(size) < 1024:
                return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
            size /= 1024
        return f"{size:.1f} TiB"

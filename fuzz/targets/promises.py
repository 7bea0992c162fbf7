"""What every target promises, whatever bytes it gets: an answer or a typed error, and nothing else."""

from __future__ import annotations


class PromiseBroken(Exception):
    """Bytes from outside made the code break one of its rules."""


def promise(kept: bool, what: str) -> None:
    """Raises PromiseBroken with ``what`` unless it was kept."""
    if not kept:
        raise PromiseBroken(what)

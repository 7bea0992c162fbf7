"""Whether this machine can have networks of its own: the tests that need one are skipped by name where it cannot."""

from __future__ import annotations

import asyncio
import functools

import pytest

from farflung.core.errors import LabUnavailable
from farflung.lab.net import Lab, parse_topology


@functools.cache
def why_no_lab() -> str:
    """Empty where a lab starts here."""

    async def try_one() -> None:
        async with Lab(parse_topology("infiniband")):
            pass

    try:
        asyncio.run(try_one())
    except LabUnavailable as error:
        return error.message
    return ""


def require_lab() -> None:
    if reason := why_no_lab():
        pytest.skip(f"no emulated network on this machine: {reason}")

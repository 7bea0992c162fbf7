"""A driver as the command line names it: which swarm, which model, and under which keys."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from farflung.cli.admission import read_swarm_key

if TYPE_CHECKING:
    from farflung.session import Swarm


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What ``generate`` and ``chat`` are told; see ``cli.options`` and ``cli.admission``."""

    directory: str
    model: str
    swarm_key: str
    identity: Path | None

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Swarm]:
        """The swarm while the block runs. Raises what ``Swarm.connect`` does, IdentityError, UsageError."""
        from farflung.cli.state import driver_identity
        from farflung.session import Swarm

        swarm_key = read_swarm_key(self.swarm_key)
        with driver_identity(self.identity) as identity:
            async with Swarm.connect(self.directory, self.model, identity=identity, swarm_key=swarm_key) as swarm:
                yield swarm

"""A line to a peer that was there a moment ago: tried again until it stands or there is no hope. Nodes and drivers alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from farflung.core.errors import LinkError, NobodyListens, Unreachable
from farflung.core.ids import NodeId, short
from farflung.swarm.backoff import Backoff, BackoffConfig
from farflung.transport.lines import Line, LineHandler, LinkPool


@dataclass(frozen=True, kw_only=True)
class ReconnectConfig:
    """How a broken edge is taken up again.

    Attributes:
        give_up_after_s: how long the other end is tried.
        gone_after_s: the same where its machine answers that nothing listens there: the process is gone.
        backoff: waits between two tries.
    """

    give_up_after_s: float = 6.0
    gone_after_s: float = 1.0
    backoff: BackoffConfig = field(default_factory=lambda: BackoffConfig(first_s=0.05, longest_s=0.5))


async def dial_again(
    pool: LinkPool,
    handler: LineHandler,
    wanted: Callable[[], NodeId | None],
    config: ReconnectConfig,
    random: Random,
    *,
    patient: bool = True,
) -> Line | None:
    """A line to the wanted peer; None where none is wanted any more.

    Args:
        handler: takes the line's frames.
        wanted: asked before every try and after it.
        random: for the waits between tries.
        patient: False: the first failure is raised.

    Raises the last LinkError once the time is up, and at once what no second try can mend (another key, no common version).
    """
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    backoff = Backoff(config.backoff, random)
    while (peer := wanted()) is not None:
        left_s = config.give_up_after_s - (loop.time() - started_s)
        try:
            line = await _line_within(pool, handler, peer, left_s if patient else None)
        except LinkError as error:
            wait_s = backoff.next_s()
            most_s = config.gone_after_s if isinstance(error, NobodyListens) else config.give_up_after_s
            if not patient or loop.time() + wait_s - started_s > most_s:
                raise
            await asyncio.sleep(wait_s)
            continue
        if wanted() == peer:
            return line
        line.release()
    return None


async def _line_within(pool: LinkPool, handler: LineHandler, peer: NodeId, timeout_s: float | None) -> Line:
    try:
        async with asyncio.timeout(timeout_s):
            return await pool.line(peer, handler)
    except TimeoutError:
        raise Unreachable(
            f"node {short(peer)} did not answer again", hint="its machine or the network between is down"
        ) from None

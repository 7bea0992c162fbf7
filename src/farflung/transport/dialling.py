"""Trying the addresses of one peer: which to try when, and what to say when none answers. For every transport."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from farflung.core.errors import FarflungError, IdentityError, LinkError, Unreachable, VersionMismatch
from farflung.core.ids import NodeId, short
from farflung.transport.frame_link import FrameLink

OnRefused = Callable[[str, FarflungError], None]
"""Told of each accepted connection that came to nothing: where it came from, and why."""

_HEAD_START_S = 0.25  # RFC 8305, 5: connection attempt delay


async def first_that_answers(
    peer: NodeId, addresses: Sequence[str], attempt: Callable[[str], Awaitable[FrameLink]], *, timeout_s: float
) -> FrameLink:
    """Dials the addresses in order, each a quarter second after the one before or as soon as that has failed; the first wins.

    Args:
        peer: for messages.
        addresses: as announced; one that makes no sense counts as one that does not answer.
        attempt: dials one address; raises FarflungError; cleans up after itself when cancelled.
        timeout_s: for all of it.

    Raises:
        WrongPeer, VersionMismatch: no address leads to the peer, but one leads to that.
        Unreachable: no address answered; says why for each.
    """
    loop = asyncio.get_running_loop()
    by = loop.time() + timeout_s
    waiting = list(dict.fromkeys(addresses))
    running: dict[asyncio.Task[FrameLink], str] = {}
    failures: dict[str, FarflungError] = {}
    links: list[FrameLink] = []

    async def one(address: str) -> FrameLink:
        return await attempt(address)

    try:
        while (waiting or running) and loop.time() < by:
            if waiting:
                address = waiting.pop(0)
                running[loop.create_task(one(address), name=f"dial {short(peer)} at {address}")] = address
            patience = min(by - loop.time(), _HEAD_START_S if waiting else timeout_s)
            done, _ = await asyncio.wait(running, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in running if task in done]:  # in the order of dialling, not of a hash
                address = running.pop(task)
                error = task.exception()
                if error is None:
                    links.append(task.result())
                elif isinstance(error, FarflungError):
                    failures[address] = error
                else:
                    raise error
            if links:
                return links.pop(0)
    finally:
        await _call_off(running, links)
    raise _why(peer, addresses, failures, timeout_s)


async def _call_off(running: dict[asyncio.Task[FrameLink], str], links: list[FrameLink]) -> None:
    """Ends the attempts that still run, and the links that lost the race by a hair."""
    for task in running:
        task.cancel()
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    spare = links + [outcome for outcome in outcomes if isinstance(outcome, FrameLink)]
    await asyncio.gather(*(link.close() for link in spare))


def _why(peer: NodeId, addresses: Sequence[str], failures: dict[str, FarflungError], timeout_s: float) -> FarflungError:
    for kind in (IdentityError, VersionMismatch):
        for error in failures.values():
            if isinstance(error, kind):
                return error
    if not addresses:
        return Unreachable(f"no address of node {short(peer)} is known", hint="it has not announced itself, or no longer does")
    reasons = "; ".join(f"{address}: {failures.get(address, f'no answer within {timeout_s:.1f} s')}" for address in addresses)
    hints = [error.hint for error in failures.values() if error.hint and isinstance(error, LinkError)]
    return Unreachable(
        f"node {short(peer)} cannot be reached ({reasons})",
        hint=hints[0] if hints else "is it running, and does a firewall let this port through?",
    )

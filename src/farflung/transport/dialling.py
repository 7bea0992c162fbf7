"""Trying the addresses of one peer: which to try when, and what to say when none answers. For every transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from farflung.core.errors import (
    FarflungError,
    IdentityError,
    LinkError,
    LinkLost,
    NobodyListens,
    NotAdmitted,
    Unreachable,
    VersionMismatch,
    WrongPeer,
)
from farflung.core.ids import NodeId, short
from farflung.transport.frame_link import FrameLink

OnRefused = Callable[[str, FarflungError], None]
"""Told of each accepted connection that came to nothing: where it came from, and why."""

_HEAD_START_S = 0.25  # RFC 8305, 5: connection attempt delay


async def first_that_answers(
    peer: NodeId, addresses: Sequence[str], attempt: Callable[[str], Coroutine[Any, Any, FrameLink]], *, timeout_s: float
) -> FrameLink:
    """Dials the addresses in order, each a quarter second after the one before or as soon as that has failed; the first wins.

    Args:
        peer: for messages.
        addresses: as announced; one that makes no sense counts as one that does not answer.
        attempt: dials one address; raises FarflungError; cleans up after itself when cancelled.
        timeout_s: for all of it.

    Raises:
        WrongPeer, VersionMismatch, NotAdmitted: no address leads to the peer, but one leads to that.
        Unreachable: no address answered; says why for each.
    """
    attempts: dict[asyncio.Task[FrameLink], str] = {}
    winner: FrameLink | None = None
    try:
        try:
            first = await _race(peer, addresses, attempt, attempts, asyncio.get_running_loop().time() + timeout_s)
        finally:
            for task in attempts:
                task.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)
        winner = first  # nothing is waited for any more, so nobody can call this off and lose the link
    finally:
        for task in attempts:
            if not task.cancelled() and task.exception() is None and task.result() is not winner:
                task.result().end(LinkLost(f"node {short(peer)} answered twice, or was no longer asked for"))
    if winner is None:
        errors = {address: task.exception() for task, address in attempts.items() if not task.cancelled()}
        failures = {address: error for address, error in errors.items() if isinstance(error, FarflungError)}
        raise _why(peer, addresses, failures, timeout_s)
    return winner


async def _race(
    peer: NodeId,
    addresses: Sequence[str],
    attempt: Callable[[str], Coroutine[Any, Any, FrameLink]],
    attempts: dict[asyncio.Task[FrameLink], str],
    by: float,
) -> FrameLink | None:
    """The first link, or None where there is none by then; writes down every attempt. Raises what no attempt may raise."""
    loop = asyncio.get_running_loop()
    waiting = list(dict.fromkeys(addresses))
    running: set[asyncio.Task[FrameLink]] = set()
    while (waiting or running) and loop.time() < by:
        if waiting:
            address = waiting.pop(0)
            task = loop.create_task(attempt(address), name=f"dial {short(peer)} at {address}")
            attempts[task] = address
            running.add(task)
        patience = by - loop.time()
        done, running = await asyncio.wait(
            running, timeout=min(patience, _HEAD_START_S) if waiting else patience, return_when=asyncio.FIRST_COMPLETED
        )
        for task in [task for task in attempts if task in done]:  # in the order of dialling, not of a hash
            error = task.exception()
            if error is None:
                return task.result()
            if not isinstance(error, FarflungError):
                raise error
    return None


def settle(greeted: asyncio.Future[FrameLink], link: FrameLink | None, error: FarflungError | None) -> None:
    """Tells whoever dialled how the greeting went, unless nobody waits for it any more."""
    if greeted.done():
        return
    if error is not None:
        greeted.set_exception(error)
    elif link is not None:
        greeted.set_result(link)


def check_peer(peer: NodeId, found: NodeId, address: str) -> None:
    """Raises WrongPeer where another key answers than the one that was dialled."""
    if found != peer:
        raise WrongPeer(
            f"node {short(peer)} was dialled at {address}, but node {short(found)} answers there",
            hint="the address is stale or somebody else's; the directory has the current one",
        )


def _why(peer: NodeId, addresses: Sequence[str], failures: dict[str, FarflungError], timeout_s: float) -> FarflungError:
    for kind in (IdentityError, VersionMismatch, NotAdmitted):
        for error in failures.values():
            if isinstance(error, kind):
                return error
    if not addresses:
        return Unreachable(f"no address of node {short(peer)} is known", hint="it has not announced itself, or no longer does")
    reasons = "; ".join(f"{address}: {failures.get(address, f'no answer within {timeout_s:.1f} s')}" for address in addresses)
    hints = [error.hint for error in failures.values() if error.hint and isinstance(error, LinkError)]
    gone = len(failures) == len(set(addresses)) and all(isinstance(error, NobodyListens) for error in failures.values())
    return (NobodyListens if gone else Unreachable)(
        f"node {short(peer)} cannot be reached ({reasons})",
        hint=hints[0] if hints else "is it running, and does a firewall let this port through?",
    )

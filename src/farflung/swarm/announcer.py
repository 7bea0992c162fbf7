"""Keeps a node's record in the directory: announces, renews before the ttl ends, comes back after outages, withdraws."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from types import TracebackType

import structlog

from farflung.core.errors import BadSignature, DirectoryUnreachable, FarflungError, RecordRefused
from farflung.core.ids import short
from farflung.identity.keys import Identity
from farflung.swarm.background import Background
from farflung.swarm.backoff import Backoff, BackoffConfig
from farflung.swarm.directory import Directory
from farflung.swarm.records import NodeRecord, Withdrawal, sign_record, sign_withdrawal
from farflung.swarm.service import WallClock

_log = structlog.get_logger(__name__)

MakeRecord = Callable[[int, float], NodeRecord]
"""The record of this moment, from its sequence and time of issue (``sequence``, ``issued_unix_s``)."""


@dataclass(frozen=True)
class AnnouncerConfig:
    """Rhythm of announcing.

    Attributes:
        ttl_s: that of the records made; renewed after a third of it, less some jitter.
        withdraw_timeout_s: how long leaving may take.
        backoff: between tries while the directory is away; never longer than a renewal.
    """

    ttl_s: float = 60.0
    withdraw_timeout_s: float = 2.0
    backoff: BackoffConfig = field(default_factory=BackoffConfig)


class Announcer(Background):
    """``async with Announcer(...)``: announced, as far as the directory lets it, from entry to exit.

    Nothing that the directory says or fails to say ends it. Sequences are milliseconds of the wall clock, or one more than the
    last: they rise across restarts of the node.

    Args:
        config: rhythm.
        directory: where.
        identity: signs.
        make_record: asked for every renewal.
        wall_clock: time of issue.
        random: jitter.
    """

    def __init__(
        self,
        config: AnnouncerConfig,
        directory: Directory,
        identity: Identity,
        make_record: MakeRecord,
        *,
        wall_clock: WallClock,
        random: Random,
    ) -> None:
        super().__init__(f"announcer of {short(identity.node_id)}")
        self._config = config
        self._directory = directory
        self._identity = identity
        self._make_record = make_record
        self._wall_clock = wall_clock
        self._random = random
        self._backoff = Backoff(config.backoff, random)
        self._sequence = 0
        self._log = _log.bind(node=short(identity.node_id))
        self._wanted = asyncio.Event()
        self._settled = asyncio.Event()
        self._refusal: FarflungError | None = None
        self._was_announced = False
        self._may_be_known = False
        self._failing = ""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await super().__aexit__(kind, error, trace)
        finally:
            if self._may_be_known:
                await self._withdraw()

    def announce_now(self) -> None:
        """The record has changed in a way others should know (draining, say): announces without waiting for the renewal."""
        self._wanted.set()

    async def announced(self, timeout_s: float) -> None:
        """Returns once the directory has taken a record.

        Raises RecordRefused or BadSignature if it refuses (the announcer goes on trying), DirectoryUnreachable after
        ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
        except TimeoutError as error:
            raise DirectoryUnreachable(
                f"the directory took no record of node {short(self._identity.node_id)} within {timeout_s:g} s: "
                f"{self._failing or 'no answer yet'}",
                hint="is the directory running? The node goes on trying",
            ) from error
        if self.has_ended:
            await self.ended()
        if self._refusal is not None:
            raise self._refusal

    async def _run(self) -> None:
        try:
            while True:
                self._wanted.clear()
                wait_s = await self._announce()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._wanted.wait()
        finally:
            self._settled.set()

    async def _announce(self) -> float:
        """One try; returns the wait until the next."""
        renewal_s = self._config.ttl_s / 3 * self._random.uniform(0.8, 1.0)
        now_unix_s = self._wall_clock()
        known_before = self._may_be_known
        try:
            record = self._make_record(self._next_sequence(now_unix_s), now_unix_s)
            signed = sign_record(self._identity, record)
            self._may_be_known = True  # from now on it may arrive, whatever becomes of the answer
            await self._directory.announce(signed)
        except (RecordRefused, BadSignature) as error:
            self._may_be_known = known_before
            self._say_failing("record refused", error)
            self._refusal = error
            self._settled.set()
            return renewal_s
        except FarflungError as error:
            self._say_failing("directory lost", error)
            return min(renewal_s, self._backoff.next_s())
        if self._failing or not self._was_announced:
            self._log.info("announced", layers=str(record.layers), model=record.model)
        self._failing, self._refusal, self._was_announced = "", None, True
        self._backoff.reset()
        self._settled.set()
        return renewal_s

    async def _withdraw(self) -> None:
        now_unix_s = self._wall_clock()
        withdrawal = Withdrawal(
            node_id=self._identity.node_id,
            sequence=self._next_sequence(now_unix_s),
            issued_unix_s=now_unix_s,
            ttl_s=self._config.ttl_s,
        )
        try:
            async with asyncio.timeout(self._config.withdraw_timeout_s):
                await self._directory.withdraw(sign_withdrawal(self._identity, withdrawal))
        except (FarflungError, TimeoutError) as error:  # the record expires by itself
            self._log.warning("not withdrawn", error=str(error) or "no answer in time")

    def _next_sequence(self, now_unix_s: float) -> int:
        self._sequence = max(self._sequence + 1, int(now_unix_s * 1000))
        return self._sequence

    def _say_failing(self, event: str, error: FarflungError) -> None:
        if not self._failing:
            self._log.warning(event, error=error.message, hint=error.hint)
        self._failing = error.message

"""One generation: performs what the driver's state machine decides, and hands out the tokens.

The window for the next token goes out inside the callback that brings the answer for this one; the consumer of the tokens is
not on that path.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from msgspec.structs import replace

from farflung.core.errors import DeadlineExceeded, FarflungError, SessionRefused, StageLost, UsageError
from farflung.core.ids import NodeId, short
from farflung.core.messages import OpenText, StageTime
from farflung.core.route import Route
from farflung.core.sampling import TokenLogprob
from farflung.protocol.credit import SlotCredit
from farflung.protocol.driver import (
    DriverEvent,
    DriverState,
    Emit,
    Failed,
    Finish,
    GenerationPlan,
    SendWindow,
    Stop,
    TellIds,
    Timed,
    advance,
)
from farflung.session.ring import Ring, RingPorts
from farflung.session.stats import GenerationStats, StageStats
from farflung.session.text_output import TextOutput

MAX_DETOURS = 3
"""Nodes that one generation goes round before it gives up."""


@dataclass(frozen=True)
class Token:
    """One piece of the text. ``id`` is None for text that was held back until the end; ``text`` may be empty meanwhile.
    ``logprob``: where the sampling options ask for it."""

    id: int | None
    text: str
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationSetup:
    """Everything one generation is made of.

    Attributes:
        ring: what its lines to the stages need.
        opening: chooses a route that avoids the given nodes, and states what is to be signed.
        plan: prompt, lengths and end tokens.
        output: makes text of the tokens, and knows where it stops.
        answer_timeout_s: the longest wait for one token.
        chunk_tokens: prompt tokens per window on a route; None: as planned.
        learn: told what became of a window at every stage of a route.
    """

    ring: RingPorts
    opening: Callable[[frozenset[NodeId]], Awaitable[OpenText]]
    plan: GenerationPlan
    output: TextOutput
    answer_timeout_s: float
    chunk_tokens: Callable[[Route], int] | None = None
    learn: Callable[[Route, Sequence[StageTime]], None] = lambda route, timeline: None


class Generation:
    """Iterate over it once for the tokens. Leaving the iteration early, or ``aclose``, cancels it at every stage.

    Broken lines are taken up again, and no token changes by it. Before the first token a node that refuses or cannot be reached
    is avoided and another route tried. Iterating raises StageLost, StageFailed, SessionRefused and the like (as the stage
    reported it), LayersMissing where no route exists, DeadlineExceeded.

    Attributes:
        stats: live figures.
        finish_reason: ``stop``, ``length`` or ``cancelled`` once it is over, None before and after a failure.
    """

    def __init__(self, setup: GenerationSetup) -> None:
        self._setup = setup
        self._state = DriverState(plan=setup.plan)
        self._ring: Ring | None = None
        self._emitted: asyncio.Queue[Emit | Finish] = asyncio.Queue()
        self._last_token_s: float | None = None
        self._started_s: float | None = None
        self._at_fault: NodeId | None = None
        self._cancelled = False
        self.stats = GenerationStats(prompt_tokens=len(setup.plan.prompt))
        self.finish_reason: str | None = None

    def __aiter__(self) -> AsyncGenerator[Token, None]:
        return self._run()

    async def aclose(self) -> None:
        """Cancels it at every stage; whoever iterates sees its end."""
        self._cancelled = True
        self._feed(Stop("cancelled"))

    async def text(self) -> str:
        """Runs to the end and returns the whole text."""
        async for _ in self:
            pass
        return self.stats.text

    async def _run(self) -> AsyncGenerator[Token, None]:
        if self._started_s is not None:
            raise UsageError("a generation can be iterated only once", hint="call generate() again")
        self._started_s = asyncio.get_running_loop().time()
        avoid: frozenset[NodeId] = frozenset()
        opening = await self._setup.opening(avoid)
        while True:
            try:
                async with aclosing(self._attempt(opening)) as tokens:
                    async for token in tokens:
                        yield token
                return
            except (SessionRefused, StageLost) as error:
                culprit = self._at_fault
                if self.stats.token_ids or culprit is None or len(avoid) >= MAX_DETOURS:
                    raise
                if self._cancelled:
                    self.finish_reason = "cancelled"
                    return
                avoid |= {culprit}
                try:
                    opening = await self._setup.opening(avoid)
                except FarflungError:
                    raise error from None  # there is no other way: the first reason is the one to tell
                self._state = DriverState(plan=self._setup.plan)
                self._emitted = asyncio.Queue()
                self._at_fault = None
                if self._cancelled:  # while another route was looked for
                    self.finish_reason = "cancelled"
                    return

    async def _attempt(self, opening: OpenText) -> AsyncGenerator[Token, None]:
        """One route, to the end of the text or to a failure."""
        self.stats.route = opening.route
        plan = self._state.plan
        if self._setup.chunk_tokens is not None:
            plan = dataclasses.replace(plan, chunk_tokens=self._setup.chunk_tokens(opening.route))
        self.stats.chunk_tokens = plan.chunk_tokens
        self._state = replace(self._state, plan=plan, slots=SlotCredit(len(opening.route.hops)))
        ring = self._ring = Ring(self._setup.ring, opening, self._feed_or_fail)
        keeping = asyncio.create_task(ring.run(), name=f"ring of session {short(opening.session)}")
        try:
            async with aclosing(self._consume(keeping)) as tokens:
                async for token in tokens:
                    yield token
        finally:
            self._feed(Stop("cancelled"))
            try:
                await ring.close(self.finish_reason or "cancelled", wait_for_reports=self.finish_reason in ("stop", "length"))
            finally:  # whoever waits may be cancelled while reports are waited for
                keeping.cancel()
                self._count(opening, ring)
            await asyncio.wait([keeping])

    async def _consume(self, keeping: asyncio.Task[None]) -> AsyncGenerator[Token, None]:
        while True:
            emitted = await self._next(keeping)
            if isinstance(emitted, Finish):
                if emitted.error is not None:
                    self._at_fault = emitted.node_id
                    raise emitted.error
                self.finish_reason = emitted.reason
                if tail := self._setup.output.finish():
                    self.stats.text += tail
                    yield Token(None, tail)
                return
            text, stopped = self._setup.output.push(emitted.token)
            self.stats.token_ids.append(emitted.token)
            self.stats.text += text
            yield Token(emitted.token, text, emitted.logprob)
            if stopped:
                self.finish_reason = "stop"
                self._feed(Stop("stop"))
                return

    async def _next(self, keeping: asyncio.Task[None]) -> Emit | Finish:
        timeout_s = self._setup.answer_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._emitted.get()
        except TimeoutError:
            if keeping.done():
                keeping.result()  # never ends by itself: what it raises is a defect, and to be seen
            raise DeadlineExceeded(
                f"no token came within {timeout_s:.0f} s",
                hint="a stage may be overloaded: see `farflung status`, or raise the timeout",
            ) from None

    def _feed_or_fail(self, event: DriverEvent, node_id: NodeId) -> None:
        """What happens at the line to a stage. A rule that it breaks, or a link that takes no more, ends the generation."""
        try:
            self._feed(event)
        except FarflungError as error:
            self._feed(Failed(error, node_id))

    def _feed(self, event: DriverEvent) -> None:
        self._state, effects = advance(self._state, event)
        for effect in effects:
            match effect:
                case SendWindow():
                    self.stats.rounds += len(effect.window.want)
                    if self._ring is not None:
                        self._ring.send(effect.window, effect.token_ids)
                case TellIds():
                    if self._ring is not None:
                        self._ring.tell_ids(effect.slots, effect.token_ids)
                case Emit():
                    self._time_token()
                    self._emitted.put_nowait(effect)
                case Timed():
                    self.stats.timelines.append(effect.timeline)
                    if self.stats.route is not None:
                        self._setup.learn(self.stats.route, effect.timeline)
                case Finish():
                    if self._ring is not None:
                        self._ring.say_goodbye(effect.reason)  # whoever reads the tokens may take long: leases end now
                    self._emitted.put_nowait(effect)

    def _time_token(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._last_token_s is not None:
            self.stats.inter_token_s.append(now_s - self._last_token_s)
        elif self._started_s is not None:
            self.stats.ttft_s = now_s - self._started_s
        self._last_token_s = now_s

    def _count(self, opening: OpenText, ring: Ring) -> None:
        """What the ring measured."""
        stats = self.stats
        stats.bytes_sent += sum(stage.bytes_sent for stage in ring.stages.values())
        stats.bytes_received += sum(stage.bytes_received for stage in ring.stages.values())
        stats.reconnects += ring.reconnects
        reports = {node_id: stage.report for node_id, stage in ring.stages.items()}
        stats.stages = [
            StageStats.of(hop.layers, report) for hop in opening.route.hops if (report := reports.get(hop.node_id)) is not None
        ]

"""One generation: performs what the driver's state machine decides, over one line to every stage of the route.

The window for the next token goes out inside the callback that brings the answer for this one; the consumer of the tokens is
not on that path.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from farflung.core.errors import (
    Cancelled,
    DeadlineExceeded,
    FarflungError,
    LinkError,
    ProtocolViolation,
    SessionRefused,
    StageLost,
    UsageError,
    error_from_code,
    first_cause,
)
from farflung.core.ids import NodeId, short
from farflung.core.messages import Answer, Attach, Close, Credit, Fault, Open, OpenText, Report, Window
from farflung.core.route import Hop
from farflung.identity.keys import Identity
from farflung.protocol.driver import (
    AnswerReceived,
    Begin,
    CreditReceived,
    DriverEvent,
    DriverState,
    Emit,
    Failed,
    Finish,
    GenerationPlan,
    SendWindow,
    Stop,
    advance,
)
from farflung.protocol.opening import OPEN_CONTEXT, encode_open_text
from farflung.session.stage_line import StageLine
from farflung.session.stats import GenerationStats, StageStats
from farflung.session.text_output import TextOutput
from farflung.transport.lines import Line, LinkPool, try_send
from farflung.transport.link import Frame, Priority

MAX_DETOURS = 3
"""Nodes that one generation goes round before it gives up."""

REPORT_WAIT_S = 0.5
"""How long the end of a generation waits for the stages' reports."""


@dataclass(frozen=True)
class Token:
    """One piece of the text. ``id`` is None for text that was held back until the end; ``text`` may be empty meanwhile."""

    id: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class GenerationSetup:
    """Everything one generation is made of.

    Attributes:
        identity: the owner's key, which signs the opening.
        pool: the driver's links.
        opening: chooses a route that avoids the given nodes, and states what is to be signed.
        plan: prompt, lengths and end tokens.
        output: makes text of the tokens, and knows where it stops.
        answer_timeout_s: the longest wait for one token.
    """

    identity: Identity
    pool: LinkPool
    opening: Callable[[frozenset[NodeId]], Awaitable[OpenText]]
    plan: GenerationPlan
    output: TextOutput
    answer_timeout_s: float


class Generation:
    """Iterate over it once for the tokens. Leaving the iteration early, or ``aclose``, cancels it at every stage.

    Before the first token a node that refuses or cannot be reached is avoided and another route tried. Iterating raises
    StageLost, StageFailed, SessionRefused and the like (as the stage reported it), LayersMissing where no route exists,
    DeadlineExceeded.

    Attributes:
        stats: live figures.
        finish_reason: ``stop``, ``length`` or ``cancelled`` once it is over, None before and after a failure.
    """

    def __init__(self, setup: GenerationSetup) -> None:
        self._setup = setup
        self._state = DriverState(plan=setup.plan)
        self._opening: OpenText | None = None
        self._stages: dict[NodeId, StageLine] = {}
        self._emitted: asyncio.Queue[int | Finish] = asyncio.Queue()
        self._reported = asyncio.Event()
        self._last_token_s: float | None = None
        self._started_s: float | None = None
        self._at_fault: NodeId | None = None
        self.stats = GenerationStats(prompt_tokens=len(setup.plan.prompt))
        self.finish_reason: str | None = None

    def __aiter__(self) -> AsyncGenerator[Token, None]:
        return self._run()

    async def aclose(self) -> None:
        """Cancels it at every stage; whoever iterates sees its end."""
        self._feed(Stop("cancelled"))
        if self.finish_reason is None:
            self._say_goodbye("cancelled")

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
        self._opening = await self._setup.opening(avoid)
        while True:
            try:
                async with aclosing(self._attempt(self._opening)) as tokens:
                    async for token in tokens:
                        yield token
                return
            except (SessionRefused, StageLost) as error:
                culprit = self._at_fault
                if self.stats.token_ids or culprit is None or len(avoid) >= MAX_DETOURS:
                    raise
                avoid |= {culprit}
                try:
                    self._opening = await self._setup.opening(avoid)
                except FarflungError:
                    raise error from None  # there is no other way: the first reason is the one to tell
                self._state = DriverState(plan=self._setup.plan)
                self._emitted = asyncio.Queue()
                self._at_fault = None

    async def _attempt(self, opening: OpenText) -> AsyncGenerator[Token, None]:
        """One route, to the end of the text or to a failure."""
        self.stats.route = opening.route
        self._stages = {}
        self._reported = asyncio.Event()
        try:
            await self._open(opening)
            async with aclosing(self._consume()) as tokens:
                async for token in tokens:
                    yield token
        finally:
            await self._close(opening)

    # -- opening -----------------------------------------------------------------------------------------------------

    async def _open(self, opening: OpenText) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for hop in opening.route.hops:
                    group.create_task(self._join(hop, opening))
        except BaseExceptionGroup as failures:
            cause = first_cause(failures)
            if cause is None:
                raise
            raise cause from None

    async def _join(self, hop: Hop, opening: OpenText) -> None:
        """A line to one stage. All are dialled in parallel; the first prompt chunk leaves as soon as the first stage is up."""
        try:
            line = await self._setup.pool.line(hop.node_id, self)
            self._stages[hop.node_id] = StageLine.over(line)
            if hop is opening.route.hops[0]:
                text = encode_open_text(opening)
                line.send(Open(text, self._setup.identity.sign(text, context=OPEN_CONTEXT)), (), Priority.PREFILL)
                self._feed(Begin())
            else:
                line.send(Attach(opening.session))
        except FarflungError as error:
            self._at_fault = hop.node_id
            raise self._lost(hop.node_id, "cannot be reached", error) from error

    # -- running -----------------------------------------------------------------------------------------------------

    async def _consume(self) -> AsyncGenerator[Token, None]:
        timeout_s = self._setup.answer_timeout_s
        while True:
            try:
                async with asyncio.timeout(timeout_s):
                    emitted = await self._emitted.get()
            except TimeoutError:
                raise DeadlineExceeded(
                    f"no token came within {timeout_s:.0f} s",
                    hint="a stage may be overloaded: see `farflung status`, or raise the timeout",
                ) from None
            if isinstance(emitted, Finish):
                if emitted.error is not None:
                    self._at_fault = emitted.node_id
                    raise emitted.error
                self.finish_reason = emitted.reason
                if tail := self._setup.output.finish():
                    self.stats.text += tail
                    yield Token(None, tail)
                return
            text, stopped = self._setup.output.push(emitted)
            self.stats.token_ids.append(emitted)
            self.stats.text += text
            yield Token(emitted, text)
            if stopped:
                self.finish_reason = "stop"
                self._feed(Stop("stop"))
                return

    def on_frame(self, line: Line, frame: Frame) -> None:
        message = frame.message
        opening = self._opening
        if opening is None:
            return
        hops = opening.route.hops
        try:
            match message:
                case Answer() if line.peer == hops[-1].node_id:
                    self._feed(AnswerReceived(message))
                case Credit() if line.peer == hops[0].node_id:
                    self._feed(CreditReceived(message.bytes))
                case Fault():
                    error = error_from_code(message.code, message.message, message.hint)
                    self._feed(Failed(error, message.node_id))
                case Report():
                    self._take_report(line, message)
                case Close():
                    self._feed(Failed(Cancelled(f"node {short(line.peer)} closed the session: {message.reason[:200]}")))
                case _:
                    raise ProtocolViolation(f"a {type(message).__name__} from node {short(line.peer)} means nothing here")
        except FarflungError as error:
            self._feed(Failed(error, line.peer))

    def on_lost(self, line: Line, error: FarflungError) -> None:
        self._reported.set()
        self._feed(Failed(self._lost(line.peer, "is gone", error), line.peer))

    def _take_report(self, line: Line, report: Report) -> None:
        stage = self._stages.get(line.peer)
        if stage is not None:
            stage.report = report
        if all(stage.report is not None for stage in self._stages.values()):
            self._reported.set()

    def _lost(self, node_id: NodeId, what: str, error: FarflungError) -> StageLost:
        hops = self._opening.route.hops if self._opening is not None else ()
        layers = next((hop.layers for hop in hops if hop.node_id == node_id), None)
        return StageLost(
            f"node {short(node_id)} (layers {layers}) {what}: {error}",
            hint="start another node for these layers, or try again over another route",
        )

    def _feed(self, event: DriverEvent) -> None:
        self._state, effects = advance(self._state, event)
        for effect in effects:
            match effect:
                case SendWindow():
                    self._send(effect.window, effect.token_ids)
                case Emit():
                    self._time_token()
                    self._emitted.put_nowait(effect.token)
                case Finish():
                    self._emitted.put_nowait(effect)

    def _send(self, window: Window, token_ids: Sequence[int]) -> None:
        if self._opening is None:
            raise ProtocolViolation("a window is to be sent before the route is known")
        first = self._opening.route.hops[0].node_id
        ids = np.array(token_ids, dtype="<i4").tobytes()
        try:
            self._stages[first].line.send(window, (ids,), Priority.DECODE if window.is_decode else Priority.PREFILL)
        except LinkError as error:
            raise self._lost(first, "is gone", error) from error
        self.stats.rounds += len(window.want)

    def _time_token(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._last_token_s is not None:
            self.stats.inter_token_s.append(now_s - self._last_token_s)
        elif self._started_s is not None:
            self.stats.ttft_s = now_s - self._started_s
        self._last_token_s = now_s

    # -- ending ------------------------------------------------------------------------------------------------------

    async def _close(self, opening: OpenText) -> None:
        """Tells every stage, waits a moment for their reports after a good end, and lets the lines go."""
        self._feed(Stop("cancelled"))
        self._say_goodbye(self.finish_reason or "cancelled")
        if self.finish_reason in ("stop", "length") and self._stages:
            try:
                async with asyncio.timeout(REPORT_WAIT_S):
                    await self._reported.wait()
            except TimeoutError:
                pass  # a report is a courtesy: the text is complete without it
        for stage in self._stages.values():
            stage.line.release()
            sent, received = stage.carried()
            self.stats.bytes_sent += sent
            self.stats.bytes_received += received
        reports = {node_id: stage.report for node_id, stage in self._stages.items()}
        self.stats.stages = [
            StageStats.of(hop.layers, report) for hop in opening.route.hops if (report := reports.get(hop.node_id)) is not None
        ]

    def _say_goodbye(self, reason: str) -> None:
        """Closes the session at every stage. A second close finds nobody and is dropped there."""
        for stage in self._stages.values():
            try_send(stage.line, Close(reason))

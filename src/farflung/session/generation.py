"""One generation: performs what the driver's state machine decides, over one line to every stage of the route.

The window for the next token goes out inside the callback that brings the answer for this one; the consumer of the tokens is
not on that path.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from farflung.core.errors import (
    Cancelled,
    DeadlineExceeded,
    FarflungError,
    ProtocolViolation,
    StageLost,
    UsageError,
    error_from_code,
    first_cause,
)
from farflung.core.ids import NodeId, short
from farflung.core.messages import Answer, Attach, Close, Credit, Fault, Open, OpenText, Report
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
from farflung.session.stats import GenerationStats, StageStats
from farflung.text.detokenize import Detokenizer
from farflung.text.stop import StopStrings
from farflung.transport.lines import Line, LinkPool, try_send
from farflung.transport.link import Frame, Priority

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
        opening: chooses the route and states what is to be signed.
        plan: prompt, lengths and end tokens.
        detokenizer: token ids to text; None gives tokens without text.
        stop: strings that end it.
        answer_timeout_s: the longest wait for one token.
    """

    identity: Identity
    pool: LinkPool
    opening: Callable[[], Awaitable[OpenText]]
    plan: GenerationPlan
    detokenizer: Detokenizer | None
    stop: StopStrings | None
    answer_timeout_s: float


class Generation:
    """Iterate over it once for the tokens. Leaving the iteration early, or ``aclose``, cancels it at every stage.

    Iterating raises StageLost, StageFailed, SessionRefused and the like (as the stage reported it), LayersMissing where no
    route exists, DeadlineExceeded.

    Attributes:
        stats: live figures.
        finish_reason: ``stop``, ``length`` or ``cancelled`` once it is over, None before and after a failure.
    """

    def __init__(self, setup: GenerationSetup) -> None:
        self._setup = setup
        self._state = DriverState(plan=setup.plan)
        self._opening: OpenText | None = None
        self._lines: dict[NodeId, Line] = {}
        self._emitted: asyncio.Queue[int | Finish] = asyncio.Queue()
        self._reports: dict[NodeId, Report] = {}
        self._reported = asyncio.Event()
        self._last_token_s: float | None = None
        self._started_s = 0.0
        self.stats = GenerationStats(prompt_tokens=len(setup.plan.prompt))
        self.finish_reason: str | None = None

    def __aiter__(self) -> AsyncGenerator[Token, None]:
        return self._run()

    async def aclose(self) -> None:
        """Cancels it; whoever iterates sees its end."""
        self._feed(Stop("cancelled"))

    async def text(self) -> str:
        """Runs to the end and returns the whole text."""
        async for _ in self:
            pass
        return self.stats.text

    async def _run(self) -> AsyncGenerator[Token, None]:
        if self._started_s:
            raise UsageError("a generation can be iterated only once", hint="call generate() again")
        self._started_s = asyncio.get_running_loop().time()
        sent_before, received_before = self._link_bytes()
        try:
            self._opening = await self._setup.opening()
            self.stats.route = self._opening.route
            await self._open(self._opening)
            async for token in self._consume():
                yield token
        finally:
            await self._close()
            sent, received = self._link_bytes()
            self.stats.bytes_sent, self.stats.bytes_received = sent - sent_before, received - received_before

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
        except FarflungError as error:
            raise StageLost(
                f"cannot reach node {short(hop.node_id)} (layers {hop.layers}): {error}", hint=error.hint
            ) from error
        self._lines[hop.node_id] = line
        if hop is not opening.route.hops[0]:
            line.send(Attach(opening.session))
            return
        text = encode_open_text(opening)
        line.send(Open(text, self._setup.identity.sign(text, context=OPEN_CONTEXT)), (), Priority.PREFILL)
        self._feed(Begin())

    # -- running -----------------------------------------------------------------------------------------------------

    async def _consume(self) -> AsyncGenerator[Token, None]:
        setup = self._setup
        while True:
            try:
                async with asyncio.timeout(setup.answer_timeout_s):
                    emitted = await self._emitted.get()
            except TimeoutError:
                raise DeadlineExceeded(
                    f"no token came within {setup.answer_timeout_s:.0f} s",
                    hint="a stage may be overloaded: see `farflung status`, or raise the timeout",
                ) from None
            if isinstance(emitted, Finish):
                if emitted.error is not None:
                    raise emitted.error
                self.finish_reason = emitted.reason
                tail = setup.detokenizer.finish() if setup.detokenizer is not None else ""
                if setup.stop is not None:
                    tail = setup.stop.push(tail).text_to_emit + setup.stop.finish().text_to_emit
                if tail:
                    self.stats.text += tail
                    yield Token(None, tail)
                return
            text, stopped = self._text_of(emitted)
            self.stats.token_ids.append(emitted)
            self.stats.text += text
            yield Token(emitted, text)
            if stopped:
                self.finish_reason = "stop"
                self._feed(Stop("stop"))
                return

    def _text_of(self, token: int) -> tuple[str, bool]:
        setup = self._setup
        text = setup.detokenizer.push(token) if setup.detokenizer is not None else ""
        if setup.stop is None:
            return text, False
        result = setup.stop.push(text)
        return result.text_to_emit, result.stopped is not None

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
                    self._feed(Failed(error_from_code(message.code, message.message, message.hint)))
                case Report():
                    self._reports[line.peer] = message
                    if len(self._reports) == len(self._lines):
                        self._reported.set()
                case Close():
                    self._feed(Failed(Cancelled(f"node {short(line.peer)} closed the session: {message.reason[:200]}")))
                case _:
                    raise ProtocolViolation(f"a {type(message).__name__} from node {short(line.peer)} means nothing here")
        except FarflungError as error:
            self._feed(Failed(error))

    def on_lost(self, line: Line, error: FarflungError) -> None:
        self._lines.pop(line.peer, None)
        self._reported.set()
        hops = self._opening.route.hops if self._opening is not None else ()
        layers = next((hop.layers for hop in hops if hop.node_id == line.peer), None)
        self._feed(
            Failed(
                StageLost(
                    f"node {short(line.peer)} (layers {layers}) is gone: {error}",
                    hint="start another node for these layers, or try again over another route",
                )
            )
        )

    def _feed(self, event: DriverEvent) -> None:
        self._state, effects = advance(self._state, event)
        for effect in effects:
            match effect:
                case SendWindow():
                    window = effect.window
                    ids = np.array(effect.token_ids, dtype="<i4").tobytes()
                    self._first_line.send(window, (ids,), Priority.DECODE if window.is_decode else Priority.PREFILL)
                    self.stats.rounds += len(window.want)
                case Emit():
                    self._time_token()
                    self._emitted.put_nowait(effect.token)
                case Finish():
                    self._emitted.put_nowait(effect)

    @property
    def _first_line(self) -> Line:
        if self._opening is None:
            raise ProtocolViolation("a window is to be sent before the route is known")
        return self._lines[self._opening.route.hops[0].node_id]

    def _time_token(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._last_token_s is None:
            self.stats.ttft_s = now_s - self._started_s
        else:
            self.stats.inter_token_s.append(now_s - self._last_token_s)
        self._last_token_s = now_s

    # -- ending ------------------------------------------------------------------------------------------------------

    async def _close(self) -> None:
        """Tells every stage, waits a moment for their reports after a good end, and lets the lines go."""
        self._feed(Stop("cancelled"))
        for line in self._lines.values():
            try_send(line, Close(self.finish_reason or "cancelled"))
        if self.finish_reason is not None and self._lines:
            try:
                async with asyncio.timeout(REPORT_WAIT_S):
                    await self._reported.wait()
            except TimeoutError:
                pass  # a report is a courtesy: the text is complete without it
        for line in self._lines.values():
            line.release()
        if self._opening is not None:
            self.stats.stages = [
                StageStats.of(hop.layers, self._reports[hop.node_id])
                for hop in self._opening.route.hops
                if hop.node_id in self._reports
            ]

    def _link_bytes(self) -> tuple[int, int]:
        """Sent and received so far over all links, heartbeats apart."""
        stats = [link.stats for link in self._setup.pool.links]
        return (
            sum(each.bytes_sent - each.housekeeping_bytes_sent for each in stats),
            sum(each.bytes_received - each.housekeeping_bytes_received for each in stats),
        )

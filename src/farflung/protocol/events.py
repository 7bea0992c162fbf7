"""What happens to a stage's side of a session, and what it then wants done. ``protocol.stage`` turns one into the other."""

from __future__ import annotations

from dataclasses import dataclass

from farflung.core.messages import Answer, Have, StageTime, Window
from farflung.core.sampling import TokenLogprob

Payload = bytes | memoryview


@dataclass(frozen=True)
class WindowReceived:
    """A window from the predecessor with its buffer: token ids at the first stage, coded rows at the others. ``at_s``: when, on
    the loop's clock."""

    window: Window
    payload: Payload
    at_s: float = 0.0


@dataclass(frozen=True)
class IdsReceived:
    """From the owner, at the tail: the token of each slot."""

    slots: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class StepStarted:
    """The first waiting window went to the compute thread, or the first ``max_rows`` rows of it."""

    max_rows: int


@dataclass(frozen=True)
class StepDone:
    """Its result: rows for the successor (they are in the log), or sampled tokens at the tail."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    queue_rows: int = 0
    time: StageTime | None = None


@dataclass(frozen=True)
class PredecessorUp:
    """The edge into this stage has a new line; ``epoch``: of the edge, from now on."""

    epoch: int
    asks_have: bool


@dataclass(frozen=True)
class SuccessorUp:
    """The opening went out to the successor on a new line. ``begins``: the session begins there, so it holds nothing."""

    begins: bool


@dataclass(frozen=True)
class SuccessorLost:
    """The line to the successor is gone."""


@dataclass(frozen=True)
class SuccessorReplaced:
    """The owner's newer opening names another successor, or the same one that begins anew; ``epoch``: of the edge to it."""

    epoch: int


@dataclass(frozen=True)
class HaveReceived:
    """From the successor."""

    have: Have


@dataclass(frozen=True)
class CreditReceived:
    """From the successor."""

    bytes: int


@dataclass(frozen=True)
class OwnerAttached:
    """The owner's own line to this stage is up, or up again."""


@dataclass(frozen=True)
class OwnerLost:
    """The owner's own line is gone."""


StageEvent = (
    WindowReceived
    | IdsReceived
    | StepStarted
    | StepDone
    | PredecessorUp
    | SuccessorUp
    | SuccessorLost
    | SuccessorReplaced
    | HaveReceived
    | CreditReceived
    | OwnerAttached
    | OwnerLost
)


@dataclass(frozen=True)
class Forward:
    """Send a window to the successor, with the rows of its slots from the log."""

    window: Window


@dataclass(frozen=True)
class Reply:
    """Send an answer to the owner."""

    answer: Answer


@dataclass(frozen=True)
class ReturnCredit:
    """Let the predecessor send that many more bytes."""

    bytes: int


@dataclass(frozen=True)
class TellHave:
    """Tell the predecessor what is held here."""

    have: Have


@dataclass(frozen=True)
class Settled:
    """The computed tree moved on: the slots at positions from ``start`` on are committed, ``died`` are dead. The log and the
    digests follow."""

    start: int
    slots: tuple[int, ...]
    died: frozenset[int]


StageEffect = Forward | Reply | ReturnCredit | TellHave | Settled

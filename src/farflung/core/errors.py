"""Every error that Farflung raises on purpose.

    FarflungError
    ├── UsageError                  the caller asked for something that cannot be right
    │   ├── ConfigError             a value in farflung.toml, FARFLUNG_* or an option
    │   └── PromptTooLong           prompt + max_tokens do not fit the context or the lease
    ├── ModelError                  a model on disk or on the hub
    │   ├── NotAModel               the path or name leads to no model
    │   ├── CorruptWeights          truncated, tampered or inconsistent files
    │   ├── DigestMismatch          the model here is not the model asked for
    │   └── UnsupportedModel        a family or tensor type that cannot be split right
    ├── WireError                   bytes that are not what the protocol allows
    │   ├── FrameTooLarge           a size over the limit, refused before allocation
    │   ├── MalformedFrame          a header or buffer that cannot be decoded
    │   ├── CodecError              activations that a codec cannot carry (NaN, infinity, shape)
    │   └── VersionMismatch         no protocol version in common
    ├── ProtocolViolation           well-formed frames that break a rule of the protocol
    ├── IdentityError               keys, certificates, signatures
    │   ├── WrongPeer               the other end holds another key than the one expected
    │   └── BadSignature            a signature that does not fit its text
    ├── LinkError                   talking to one peer
    │   ├── Unreachable             no connection, within the deadline, on any address
    │   │   └── NobodyListens       the machine is there and says that nothing listens: the process is gone
    │   ├── LinkLost                a connection that was up and is gone
    │   ├── LinkOverloaded          a bounded queue is full
    │   └── AddressInUse            the port to listen on is taken
    ├── DirectoryError              the directory refused, is gone or answers nonsense
    │   ├── RecordRefused           a record that is forged, stale, malformed or over a quota
    │   └── DirectoryUnreachable    no answer within the deadline
    ├── SwarmError                  the swarm as a whole cannot do this now
    │   ├── LayersMissing           no node serves some of the layers
    │   └── NoSuchModel             nobody serves this model
    ├── LabError                    the emulated network on this machine
    │   └── LabUnavailable          this machine cannot have one: its system, its rights or its compiler
    └── SessionError                one generation
        ├── SessionRefused          a node will not open it (and says what it has free)
        │   ├── LeaseExceeded       more tokens than the KV lease allows
        │   └── NotAdmitted         no swarm key, another one, or not on the list of drivers
        ├── StageLost               a node of the route is gone
        ├── StageFailed             a node of the route reported a fault
        ├── LogEvicted              rows asked for again are no longer in a stage's log
        ├── DeadlineExceeded        a wait ended before its answer came
        └── Cancelled               ended by the caller or the owner

Each error says what happened, to which node or file, with the numbers, and - in ``hint`` - what to do next. ``code`` is the
stable name that travels on the wire and in JSON.
"""

from __future__ import annotations

import re
from typing import ClassVar


class FarflungError(Exception):
    """Base of all errors above.

    Args:
        message: what happened, to whom, with numbers; one sentence, no full stop needed.
        hint: what the reader can do next; empty where nothing can be done.
    """

    code: ClassVar[str] = "error"

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(FarflungError): ...


class ConfigError(UsageError): ...


class PromptTooLong(UsageError): ...


class ModelError(FarflungError): ...


class NotAModel(ModelError): ...


class CorruptWeights(ModelError): ...


class DigestMismatch(ModelError): ...


class UnsupportedModel(ModelError): ...


class WireError(FarflungError): ...


class FrameTooLarge(WireError): ...


class MalformedFrame(WireError): ...


class CodecError(WireError): ...


class VersionMismatch(WireError): ...


class ProtocolViolation(FarflungError): ...


class IdentityError(FarflungError): ...


class WrongPeer(IdentityError): ...


class BadSignature(IdentityError): ...


class LinkError(FarflungError): ...


class Unreachable(LinkError): ...


class NobodyListens(Unreachable): ...


class LinkLost(LinkError): ...


class LinkOverloaded(LinkError): ...


class AddressInUse(LinkError): ...


class DirectoryError(FarflungError): ...


class RecordRefused(DirectoryError): ...


class DirectoryUnreachable(DirectoryError): ...


class SwarmError(FarflungError): ...


class LayersMissing(SwarmError): ...


class NoSuchModel(SwarmError): ...


class LabError(FarflungError): ...


class LabUnavailable(LabError): ...


class SessionError(FarflungError): ...


class SessionRefused(SessionError): ...


class LeaseExceeded(SessionRefused): ...


class NotAdmitted(SessionRefused): ...


class StageLost(SessionError): ...


class StageFailed(SessionError): ...


class LogEvicted(SessionError): ...


class DeadlineExceeded(SessionError): ...


class Cancelled(SessionError): ...


_MAX_TOLD = 2000
"""Characters of a peer's message or hint."""


def error_from_code(code: str, message: str, hint: str = "") -> FarflungError:
    """The error a peer reported by its ``code``; an unknown code (a newer peer) becomes ``StageFailed``.

    Its words are a stranger's and will be printed: what steers a terminal becomes a space, and no novels.
    """
    found = _by_code().get(code, StageFailed)
    return found(_for_people(message), hint=_for_people(hint))


def first_cause(group: BaseExceptionGroup[BaseException]) -> FarflungError | None:
    """The first of our errors in what a TaskGroup raised, if it raised nothing else: one cause is enough for people."""
    ours, others = group.split(FarflungError)
    if others is not None or ours is None:
        return None
    error: BaseException = ours
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, FarflungError) else None


def _for_people(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text[:_MAX_TOLD])


def _by_code() -> dict[str, type[FarflungError]]:
    found: dict[str, type[FarflungError]] = {}
    todo: list[type[FarflungError]] = [FarflungError]
    while todo:
        kind = todo.pop()
        found[kind.code] = kind
        todo.extend(kind.__subclasses__())
    return found

"""What commands say, and to whom.

With ``--json`` stdout carries JSON and nothing else; without, stdout carries what was asked for (text, tables). Remarks,
progress and errors go to stderr in both cases. Colours and progress bars appear on a terminal only (rich honours NO_COLOR).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import typer

from farflung.core.errors import FarflungError, UsageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


class Progress(Protocol):
    """Told what is being done and how far it has come, in bytes or in things."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


class Output:
    """The two channels of one command.

    Args:
        json_only: stdout is for JSON.
        debug: errors come with a traceback.
    """

    def __init__(self, *, json_only: bool = False, debug: bool = False) -> None:
        self.json_only = json_only
        self.debug = debug

    @property
    def live(self) -> bool:
        """Whether stdout is a terminal that a person watches and whose cursor can be moved."""
        if self.json_only or not sys.stdout.isatty():
            return False
        console = self._console(stderr=False)
        return not console.is_dumb_terminal and not console.legacy_windows

    def json(self, value: Mapping[str, object]) -> None:
        """One JSON object on one line of stdout, with ``--json``; otherwise nothing."""
        if self.json_only:
            sys.stdout.write(json.dumps(value) + "\n")
            sys.stdout.flush()

    def print(self, what: RenderableType) -> None:
        """What a person asked for, on stdout; nothing with ``--json``."""
        if not self.json_only:
            self._console(stderr=False).print(what, highlight=False)

    def write(self, text: str) -> None:
        """Text as it comes, on stdout; nothing with ``--json``."""
        if not self.json_only:
            sys.stdout.write(text)
            sys.stdout.flush()

    def note(self, what: RenderableType) -> None:
        """A remark, on stderr."""
        self._console(stderr=True).print(what, highlight=False)

    @contextmanager
    def progress(self, title: str, *, in_bytes: bool = True) -> Iterator[Progress]:
        """A bar on stderr while the block runs; where stderr is no terminal, a line for each thing that is being done."""
        console = self._console(stderr=True)
        if not console.is_terminal:
            yield _Lines(title, self.note)
            return
        from rich import progress as bars

        tail = (bars.DownloadColumn(), bars.TransferSpeedColumn()) if in_bytes else (bars.MofNCompleteColumn(),)
        columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), *tail, bars.TimeElapsedColumn())
        with bars.Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda what, done, total: bar.update(task, description=f"{title}: {what}", completed=done, total=total)

    @contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Says that something takes a while: a spinner on a terminal, a line elsewhere."""
        console = self._console(stderr=True)
        if not console.is_terminal:
            self.note(f"{text} ...")
            yield
            return
        with console.status(text):
            yield

    def error(self, error: FarflungError) -> None:
        """``error:`` and ``hint:`` on stderr; with ``--json`` also as an object on stdout."""
        if self.debug:
            traceback.print_exception(error)
        print_error(error.message, error.hint)
        self.json({"error": {"code": error.code, "message": error.message, "hint": error.hint}})

    def _console(self, *, stderr: bool) -> Console:
        from rich.console import Console

        return Console(stderr=stderr, soft_wrap=not (sys.stderr if stderr else sys.stdout).isatty())


class _Lines:
    """Progress for a log: says each thing once, when it begins."""

    def __init__(self, title: str, note: Callable[[str], None]) -> None:
        self._title = title
        self._note = note
        self._last = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._last:
            self._note(f"{self._title}: {what} ...")
        self._last = what


@contextmanager
def command(*, json: bool, debug: bool) -> Iterator[Output]:
    """The frame of every command: errors become a message and an exit code, as the command line promises."""
    out = Output(json_only=json, debug=debug)
    _log_to_stderr(debug)
    try:
        yield out
    except FarflungError as error:
        out.error(error)
        raise typer.Exit(exit_code(error)) from None
    except BaseExceptionGroup as group:  # of a TaskGroup: the first error that is ours speaks for all
        known = group.subgroup(FarflungError)
        if known is None:
            raise
        first = first_leaf(known)
        out.error(first)
        raise typer.Exit(exit_code(first)) from None
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        raise typer.Exit(INTERRUPTED) from None


def _log_to_stderr(debug: bool) -> None:
    """Logs of the packages below are for the operator: warnings, and with ``debug`` the rest."""
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper("%Y-%m-%d %H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty() and "NO_COLOR" not in os.environ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO if debug else logging.WARNING),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # as it is then: tests and embedders replace the stream
    )


def exit_code(error: FarflungError) -> int:
    return WRONG_USAGE if isinstance(error, UsageError) else FAILED


def first_leaf(group: BaseExceptionGroup[Any]) -> Any:
    """The first exception of a group that is no group itself."""
    found = group.exceptions[0]
    return first_leaf(found) if isinstance(found, BaseExceptionGroup) else found


def print_error(message: str, hint: str = "") -> None:
    """``error: ...`` and, where there is something to do, ``hint: ...`` on stderr."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message), highlight=False)
    if hint:
        console.print(Text.assemble(("hint: ", "bold cyan"), hint), highlight=False)

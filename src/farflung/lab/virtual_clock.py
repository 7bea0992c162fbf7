"""An asyncio loop whose clock jumps to the next timer instead of waiting for it.

Hours of protocol run in seconds, and the same program with the same seeds gives the same events in the same order. Use it
with memory links (``transport.memory``) and backends that compute nothing real: threads, sockets and processes live on the
real clock, and one executor call of 20 ms would move virtual time by as much as all timers that are set. So those calls are
refused by name.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from farflung.core.errors import UsageError

T = TypeVar("T")

_TURNS_PER_LOOK = 64


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """``time()`` starts at 0 s and moves only when every task waits. Raises UsageError where nothing can ever happen again."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self._jump))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def _jump(self, seconds: float | None) -> None:
        if seconds is None:
            waiting = sorted(_describe(task) for task in asyncio.all_tasks(self))
            raise UsageError(
                f"deadlock on the virtual clock at {self._now:.6f} s: {len(waiting)} tasks wait and no timer is set",
                hint="they wait at: " + "; ".join(waiting[:20]),
            )
        self._now += seconds


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Real events can only come from the loop's own wake-up socket: signals, and Ctrl-C through asyncio.Runner. They can
        # wait for a few turns of the loop, each of which would pay for a system call.
        self._turns += 1
        ready = super().select(0) if timeout is None or self._turns % _TURNS_PER_LOOK == 0 else []
        if not ready and timeout != 0:
            self._jump(timeout)
        return ready


def run_virtual(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs ``coroutine`` to its end on a new ``VirtualClockLoop``, as ``asyncio.run`` does on a real one.

    Raises what the coroutine raises; UsageError at a deadlock and for calls that leave virtual time.
    """
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(coroutine)


def _describe(task: asyncio.Task[Any]) -> str:
    stack = task.get_stack(limit=1)
    where = f"{stack[-1].f_code.co_qualname} line {stack[-1].f_lineno}" if stack else "its end"
    return f"{where} ({task.get_name()})"


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refused(self: VirtualClockLoop, *args: object, **kwargs: object) -> NoReturn:
        raise UsageError(
            f"{name} was called on the virtual clock, where nothing real can be waited for",
            hint="use memory links and a backend without threads, or run this on a real loop (asyncio.run)",
        )

    return refused


_REAL = (
    "run_in_executor",
    "getaddrinfo",
    "getnameinfo",
    "create_connection",
    "create_server",
    "create_datagram_endpoint",
    "create_unix_connection",
    "create_unix_server",
    "connect_accepted_socket",
    "connect_read_pipe",
    "connect_write_pipe",
    "start_tls",
    "sendfile",
    "sock_recv",
    "sock_recv_into",
    "sock_recvfrom",
    "sock_recvfrom_into",
    "sock_sendall",
    "sock_sendto",
    "sock_connect",
    "sock_accept",
    "sock_sendfile",
    "add_reader",
    "add_writer",
    "subprocess_exec",
    "subprocess_shell",
)
for _name in _REAL:
    setattr(VirtualClockLoop, _name, _refuse(_name))

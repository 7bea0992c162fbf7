from __future__ import annotations

import asyncio
import socket

import pytest

from farflung.core.errors import UsageError
from farflung.lab.virtual_clock import run_virtual


def test_hours_pass_at_once() -> None:
    async def scenario() -> float:
        await asyncio.sleep(36_000)
        return asyncio.get_running_loop().time()

    assert run_virtual(scenario()) == 36_000


def test_timers_fire_in_the_order_of_their_time() -> None:
    async def scenario() -> list[int]:
        fired: list[int] = []
        loop = asyncio.get_running_loop()
        for delay in (3, 1, 2):
            loop.call_later(delay, fired.append, delay)
        await asyncio.sleep(4)
        return fired

    assert run_virtual(scenario()) == [1, 2, 3]


def test_timeouts_work() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(2.5):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        run_virtual(scenario())


def test_the_same_program_runs_the_same_way_twice() -> None:
    async def scenario() -> list[tuple[float, int]]:
        log: list[tuple[float, int]] = []
        loop = asyncio.get_running_loop()

        async def actor(number: int) -> None:
            for step in range(5):
                await asyncio.sleep((number * 7 + step) % 3 * 0.1)
                log.append((loop.time(), number))

        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(actor(number))
        return log

    assert run_virtual(scenario()) == run_virtual(scenario())


def test_a_deadlock_is_an_error_that_says_who_waits_where() -> None:
    async def waits_for_nothing() -> None:
        await asyncio.Event().wait()

    with pytest.raises(UsageError, match="deadlock") as caught:
        run_virtual(waits_for_nothing())
    assert "waits_for_nothing" in caught.value.hint


async def _thread() -> None:
    await asyncio.to_thread(lambda: None)


async def _connect() -> None:
    await asyncio.open_connection("127.0.0.1", 1)


async def _serve() -> None:
    await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)


async def _process() -> None:
    await asyncio.create_subprocess_exec("true")


async def _raw_socket() -> None:
    with socket.socket() as opened:
        opened.setblocking(False)
        await asyncio.get_running_loop().sock_connect(opened, ("127.0.0.1", 1))


@pytest.mark.parametrize(
    ("real", "name"),
    [
        (_thread, "run_in_executor"),
        (_connect, "create_connection"),
        (_serve, "create_server"),
        (_process, "subprocess_exec"),
        (_raw_socket, "sock_connect"),
    ],
)
def test_what_lives_on_the_real_clock_is_refused_by_name(real: object, name: str) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        run_virtual(real())  # type: ignore[operator]
    assert caught.value.hint

"""An emulated network for the length of a block, with processes inside its nodes::

    async with Lab(parse_topology("fiber:2")) as lab:
        server = await lab.start("n2", ["farflung", "directory", "--listen", f"{lab.address('n2')}:7700", "--json"])
        print((await server.event(30))["url"])
        await lab.cut("n1", "n2")

When the block ends, by Ctrl-C too, the processes are ended and the network is gone. After a ``kill -9`` the emulator sees its
stdin close and does the same.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from farflung.core.errors import LabError
from farflung.lab.net import emulator
from farflung.lab.net.process import MAX_LINE_BYTES, Finished, LabProcess
from farflung.lab.net.profiles import check_settings, named_connection
from farflung.lab.net.program import change_line, full_change, pair_line
from farflung.lab.net.registry import lab_folder
from farflung.lab.net.topology import Topology, check_pair


class Lab:
    """A network of its own, apart from every other one.

    Args:
        topology: its nodes and what lies between them.
        name: shown by ``farflung lab status``; None makes one up.
    """

    def __init__(self, topology: Topology, name: str | None = None) -> None:
        self._topology = topology
        self._folder = lab_folder(name or f"run-{os.getpid()}-{secrets.token_hex(3)}")
        self._emulator: emulator.Emulator | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self._processes: list[LabProcess] = []
        self.complaints: tuple[str, ...] = ()
        """What the kernel would not set in a node."""

    async def __aenter__(self) -> Self:
        """Raises LabUnavailable where this machine cannot have a network of its own."""
        starting = asyncio.ensure_future(asyncio.to_thread(emulator.start, self._folder, self._topology, lifeline=True))
        try:
            self._emulator, self._daemon, complaints = await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait([starting])
            if not starting.cancelled() and starting.exception() is None:
                self._emulator, self._daemon, _ = starting.result()
                await self._down()
            raise
        self.complaints = tuple(complaints)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await asyncio.gather(*(process.end() for process in self._processes))
        finally:
            for process in self._processes:
                process.kill()
            await self._down()

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self._up.places)

    def address(self, node: str) -> str:
        """A node's own address: what to listen on there."""
        return self._up.place(node).address

    def public_address(self, node: str) -> str:
        """What other nodes see of it: the same, unless it is behind NAT."""
        return self._up.place(node).public

    async def start(
        self, node: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None, name: str = ""
    ) -> LabProcess:
        """Starts ``argv`` inside ``node`` with pipes; it is ended with the lab at the latest.

        It is in a group of its own, so that Ctrl-C reaches this process alone.
        """
        process = await asyncio.create_subprocess_exec(
            *self._up.command(node, argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            env={**os.environ, **self._up.environment(node), **(env or {})},
            start_new_session=True,
        )
        started = LabProcess(name or f"{argv[0]} in {node}", process)
        self._processes.append(started)
        return started

    async def run(
        self, node: str, argv: Sequence[str], *, timeout_s: float = 60.0, env: Mapping[str, str] | None = None
    ) -> Finished:
        """Runs ``argv`` inside ``node`` to its end. Raises DeadlineExceeded."""
        process = await self.start(node, argv, env=env)
        try:
            return await process.finished(timeout_s)
        finally:
            process.kill()

    async def set(self, node: str, **changes: Any) -> None:
        """Changes how a node is connected: ``await lab.set("n3", up_mbps=1, rtt_ms=400)``. Raises UsageError."""
        line = change_line(self._up.place(node).name, check_settings(changes))
        await asyncio.to_thread(self._up.tell, line)

    async def set_profile(self, node: str, profile: str) -> None:
        """Gives a node another profile, e.g. ``5g+lossy``. Raises UsageError."""
        await asyncio.to_thread(self._up.tell, full_change(self._up.place(node).name, profile, named_connection(profile)))

    async def set_pair(self, a: str, b: str, **changes: Any) -> None:
        """Changes what lies between two nodes: ``base_rtt_ms``, ``rtt_ms``, ``loss_pct``, ``cut``. Raises UsageError."""
        names = self._up.place(a).name, self._up.place(b).name
        await asyncio.to_thread(self._up.tell, pair_line(*names, dict(check_pair(changes))))

    async def cut(self, a: str, b: str | None = None) -> None:
        """Nothing passes between two nodes, or to and from one."""
        await (self.set(a, cut=True) if b is None else self.set_pair(a, b, cut=1))

    async def heal(self, a: str, b: str | None = None) -> None:
        """Ends a cut."""
        await (self.set(a, cut=False) if b is None else self.set_pair(a, b, cut=0))

    async def stats(self) -> dict[str, Any]:
        """Settings and counters of every node, cuts, and how punctual the emulator is."""
        return await asyncio.to_thread(self._up.stats)

    async def reset_stats(self) -> None:
        """Sets every counter to zero."""
        await asyncio.to_thread(self._up.tell, "reset")

    @property
    def _up(self) -> emulator.Emulator:
        if self._emulator is None:
            raise LabError("the lab is not up", hint="use it inside 'async with Lab(...)'")
        return self._emulator

    async def _down(self) -> None:
        if self._daemon is not None:
            for pipe in (self._daemon.stdin, self._daemon.stdout):
                if pipe is not None:
                    pipe.close()  # the lifeline: it ends what still runs inside, then itself
            try:
                await asyncio.to_thread(self._daemon.wait, 5.0)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
        await asyncio.to_thread(self._folder.sweep)
        self._emulator = None

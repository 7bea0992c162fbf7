"""What ``farflung doctor`` looks at. Each check says what it found, and what to do where that is not good."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from farflung.core.errors import DeadlineExceeded, FarflungError
from farflung.core.units import Bytes

OLDEST_SANE_CLOCK = datetime(2026, 1, 1, tzinfo=UTC)
"""No Farflung existed before, so a clock that says less is wrong."""

MAX_CLOCK_SKEW_S = 30.0
"""Openings and records carry wall-clock times; a node whose clock is further off refuses and is refused."""

ENOUGH_MEMORY = Bytes(3 * 1024**3)
"""The demo holds Gemma-3-270m in fp32 in three processes: some 2.5 GiB."""

ENOUGH_DISK = Bytes(1024**3)


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``hint`` may also improve what is ok."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def all_checks(directory: str, listen: str, key: str) -> Iterator[Check]:
    """Every check, one after another, so that each can be shown as soon as it is done."""
    yield python_version()
    yield torch_import()
    yield processor()
    yield openmp_policy()
    yield memory()
    yield cache_folder()
    yield link()
    yield port(listen)
    yield swarm_key(key)
    yield demo_model()
    yield clock(datetime.now(UTC))
    if directory:
        yield directory_server(directory)


def python_version() -> Check:
    ok = sys.version_info >= (3, 11)
    return Check(
        "python",
        ok,
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "" if ok else "Farflung needs Python 3.11 or newer",
    )


def torch_import() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing
        return Check("torch", False, f"cannot be imported: {error}", "pip install torch (see constraints.txt for the version)")
    transformers = importlib.metadata.version("transformers")
    return Check("torch", True, f"{torch.__version__}, transformers {transformers}, {torch.get_num_threads()} threads")


def processor() -> Check:
    import psutil

    cores, threads = psutil.cpu_count(logical=False), psutil.cpu_count()
    flags = _cpu_flags()
    fast = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd", "bf16") if name in flags]
    detail = f"{cores} cores, {threads} threads, {' '.join(fast) or 'features not known here'}"
    if flags and not fast:
        return Check("processor", True, detail, "without AVX2 this machine computes slowly")
    return Check("processor", True, detail)


def openmp_policy() -> Check:
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.upper() == "ACTIVE":
        return Check(
            "openmp",
            True,
            "OMP_WAIT_POLICY=ACTIVE",
            "on few cores PASSIVE is faster: unset the variable",
        )
    return Check("openmp", True, f"OMP_WAIT_POLICY={policy}" if policy else "farflung node waits passively")


def memory() -> Check:
    import psutil

    free, total = Bytes(psutil.virtual_memory().available), Bytes(psutil.virtual_memory().total)
    ok = free >= ENOUGH_MEMORY
    return Check(
        "memory",
        ok,
        f"{free} of {total} available",
        "" if ok else f"the demo needs about {ENOUGH_MEMORY}; close programs, or serve fewer layers here (--layers)",
    )


def cache_folder() -> Check:
    import platformdirs

    folder = platformdirs.user_cache_path("farflung")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"farflung")
    except OSError as error:
        return Check(
            "cache",
            False,
            f"{folder} cannot be written: {error.strerror}",
            "give the folder to this user",
        )
    free = Bytes(shutil.disk_usage(folder).free)
    ok = free >= ENOUGH_DISK
    return Check("cache", ok, f"{folder}, {free} free", "" if ok else f"models are kept there; make room for {ENOUGH_DISK}")


def link() -> Check:
    try:
        round_trip_ms = asyncio.run(_measure_link())
    except FarflungError as error:
        return Check("link", False, f"no TLS link over loopback: {error.message}", error.hint or "is loopback closed?")
    return Check("link", True, f"TLS 1.3 over loopback, both keys checked, {round_trip_ms:.2f} ms there and back")


def port(listen: str) -> Check:
    host, _, number = listen.rpartition(":")
    try:
        with socket.create_server((host.strip("[]"), int(number))) as server:
            return Check("port", True, f"{host}:{server.getsockname()[1]} can be listened on")
    except (OSError, ValueError, OverflowError) as error:
        return Check("port", False, f"{listen} cannot be listened on: {error}", "choose another port, or free this one")


def swarm_key(value: str) -> Check:
    from farflung.cli.admission import read_swarm_key

    try:
        key = read_swarm_key(value)
    except FarflungError as error:
        return Check("swarm key", False, error.message, error.hint)
    if key is None:
        return Check("swarm key", True, "none is set: for nodes of this machine alone, and swarms open to anyone")
    return Check("swarm key", True, f"set, fingerprint {key.fingerprint}")


def demo_model() -> Check:
    from farflung.engine.catalog import CATALOG, is_assembled, missing_packages

    here = [name for name, entry in CATALOG.items() if is_assembled(entry) or not missing_packages(entry)]
    if here:
        return Check("models", True, f"{', '.join(here)} can be run here")
    return Check("models", False, "no built-in model is installed", "farflung models fetch gemma3-270m")


def clock(now: datetime) -> Check:
    ok = now >= OLDEST_SANE_CLOCK
    return Check("clock", ok, f"{now:%Y-%m-%d %H:%M:%S} UTC", "" if ok else "set the clock; what nodes sign is dated")


def directory_server(url: str) -> Check:
    import httpx2

    try:
        answer = httpx2.get(url, timeout=5.0)
        served = parsedate_to_datetime(answer.headers["date"])
    except (httpx2.HTTPError, httpx2.InvalidURL, KeyError, ValueError) as error:
        return Check("directory", False, f"{url}: {error or type(error).__name__}", "is it running, and is the address right?")
    skew_s = (datetime.now(UTC) - served).total_seconds()
    ok = abs(skew_s) <= MAX_CLOCK_SKEW_S
    detail = f"{url} answers; this clock is {skew_s:+.0f} s off its clock"
    return Check("directory", ok, detail, "" if ok else "set the clocks of both machines, best by NTP")


def _cpu_flags() -> set[str]:
    """Processor features as Linux names them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return set(next(lines, "").partition(":")[2].split())


async def _measure_link() -> float:
    """Median milliseconds for 8 KiB there and back over a real link between two fresh identities."""
    from farflung.core.messages import Window
    from farflung.identity.keys import Identity
    from farflung.transport.link import Frame, Link, LinkConfig, Priority
    from farflung.transport.tcp import TcpTransport

    class Echo:
        def on_frame(self, link: Link, channel: int, frame: Frame) -> None:
            link.send(channel, frame, Priority.DECODE)

        def on_lost(self, link: Link, error: FarflungError) -> None: ...

    class Arrivals:
        def __init__(self) -> None:
            self.queue: asyncio.Queue[Frame | FarflungError] = asyncio.Queue()

        def on_frame(self, link: Link, channel: int, frame: Frame) -> None:
            self.queue.put_nowait(frame)

        def on_lost(self, link: Link, error: FarflungError) -> None:
            self.queue.put_nowait(error)

    here, there = (TcpTransport(Identity.generate(), LinkConfig()) for _ in range(2))
    try:
        listener = await there.listen("127.0.0.1:0", lambda link: link.start(Echo()))
        link = await here.dial(there.node_id, [listener.address])
        arrivals = Arrivals()
        link.start(arrivals)
        channel = link.new_channel()
        frame = Frame(Window(epoch=0, runs=()), (bytes(8192),))
        times_ms = []
        for _ in range(50):
            started = time.perf_counter()
            link.send(channel, frame, Priority.DECODE)
            async with asyncio.timeout(2.0):
                arrived = await arrivals.queue.get()
            if isinstance(arrived, FarflungError):
                raise arrived
            times_ms.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times_ms)
    except TimeoutError as error:
        raise DeadlineExceeded("8 KiB over loopback did not come back within 2 s") from error
    finally:
        await here.close()
        await there.close()

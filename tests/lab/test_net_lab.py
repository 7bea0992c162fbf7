"""A real network between real namespaces: delays, rates, cuts, address translation, and what is left when it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from net_machine import require_lab

from farflung.core.errors import DeadlineExceeded, LabError, UsageError
from farflung.lab.net import Lab, parse_topology
from farflung.lab.net.emulator import connect, start
from farflung.lab.net.registry import MARK, all_folders, lab_folder
from farflung.lab.net.topology import topology_of

pytestmark = pytest.mark.slow

PYTHON = sys.executable

ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("0.0.0.0", 9000)); print('{"ready": true}', flush=True)
while True:
    data, sender = s.recvfrom(2000); s.sendto(f"{sender[0]} {sender[1]}".encode(), sender)
"""
ASK = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("0.0.0.0", int(sys.argv[1]))); s.settimeout(float(sys.argv[2]))
for to in sys.argv[3:]:
    began = time.perf_counter(); s.sendto(b"x", (to, 9000))
    try: print(s.recv(2000).decode(), round(1e3 * (time.perf_counter() - began), 3))
    except TimeoutError: print("nothing")
"""


@pytest.fixture(autouse=True)
def _own_labs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    require_lab()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield
    assert all_folders() == [], "a lab left its folder behind"


async def asked(lab: Lab, node: str, *to: str, port: int = 0, patience_s: float = 2.0) -> list[str]:
    done = await lab.run(node, [PYTHON, "-c", ASK, str(port), str(patience_s), *(lab.public_address(n) for n in to)])
    assert done.code == 0, done.stderr
    return done.stdout.splitlines()


async def echo(lab: Lab, node: str) -> None:
    await (await lab.start(node, [PYTHON, "-c", ECHO])).event(30)


def test_a_packet_takes_at_least_its_way_and_a_change_holds_at_once() -> None:
    async def main() -> None:
        async with Lab(parse_topology("fiber,cable")) as lab:
            await echo(lab, "n2")
            first = (await asked(lab, "n1", "n2"))[0].split()
            assert first[0] == lab.address("n1")
            assert float(first[2]) >= 15
            await lab.set("n1", rtt_ms=100)
            assert float((await asked(lab, "n1", "n2"))[0].split()[2]) >= 60
            await lab.set_pair("n1", "n2", rtt_ms=200)
            assert float((await asked(lab, "n1", "n2"))[0].split()[2]) >= 200
            await lab.set_profile("n1", "5g+lossy")
            assert (await lab.stats())["nodes"]["n1"]["label"] == "5g+lossy"

    asyncio.run(main())


def test_a_cut_pair_hears_nothing_until_it_is_healed_and_others_hear_each_other() -> None:
    async def main() -> None:
        async with Lab(parse_topology("infiniband:3")) as lab:
            await echo(lab, "n2")
            await echo(lab, "n3")
            await lab.cut("n1", "n2")
            cut, other = await asked(lab, "n1", "n2", "n3", patience_s=0.5)
            assert cut == "nothing"
            assert other.startswith(lab.address("n1"))
            await lab.heal("n1", "n2")
            assert (await asked(lab, "n1", "n2"))[0] != "nothing"
            await lab.cut("n2")
            assert (await asked(lab, "n3", "n2", patience_s=0.5)) == ["nothing"]
            drops = {name: node["drops"]["cut"] for name, node in (await lab.stats())["nodes"].items()}
            assert drops["n1"] >= 1

    asyncio.run(main())


def test_a_link_carries_no_more_than_its_rate() -> None:
    async def main() -> None:
        async with Lab(parse_topology("lan:2")) as lab:
            await lab.set("n2", down_mbps=8)
            source = """
                import socket
                s = socket.create_server(("0.0.0.0", 9000)); print("{}", flush=True); c, _ = s.accept(); c.sendall(bytes(10**6))
            """
            await (await lab.start("n1", [PYTHON, "-c", textwrap.dedent(source)])).event(30)
            sink = """
                import socket, sys, time
                s = socket.create_connection((sys.argv[1], 9000)); n = 0; began = time.perf_counter()
                while data := s.recv(65536): n += len(data)
                print(n, time.perf_counter() - began)
            """
            done = await lab.run("n2", [PYTHON, "-c", textwrap.dedent(sink), lab.address("n1")])
            received, seconds = done.stdout.split()
            assert int(received) == 10**6
            assert float(seconds) >= 0.95  # 8 Mbit at 8 Mbps, but for what the queue had at the start

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["full-cone", "cone", "symmetric"])
def test_a_node_behind_nat_is_seen_from_outside_as_that_kind_of_router_shows_it(kind: str) -> None:
    topology = topology_of({"nodes": {"home": {"nat": kind}, "a": {}, "b": {}}})
    late = """
        import socket, sys
        s = socket.socket(2, 2); s.bind(("0.0.0.0", 7777)); s.sendto(b"knock", (sys.argv[1], int(sys.argv[2])))
    """
    listen = """
        import socket, sys
        s = socket.socket(2, 2); s.bind(("0.0.0.0", 4000)); s.settimeout(20)
        s.sendto(b"x", (sys.argv[1], 9000)); print('{"seen": "%s"}' % s.recv(100).decode(), flush=True)
        s.settimeout(1.5)
        try: print('{"heard": "%s"}' % s.recv(100).decode(), flush=True)
        except TimeoutError: print('{"heard": ""}', flush=True)
    """

    async def main() -> None:
        async with Lab(topology) as lab:
            assert lab.address("home") == "192.168.1.2"
            assert lab.public_address("home") == "10.77.0.1"
            for node in ("a", "b"):
                await echo(lab, node)
            seen = [line.split() for line in await asked(lab, "home", "a", "b", port=5000)]
            assert {line[0] for line in seen} == {"10.77.0.1"}
            ports = [line[1] for line in seen]
            assert (ports[0] == ports[1]) == (kind != "symmetric")
            if kind != "symmetric":
                assert ports[0] == "5000"
            # home speaks to a; then b, to whom it has not spoken from there, knocks at the port that a saw
            home = await lab.start("home", [PYTHON, "-c", textwrap.dedent(listen), lab.address("a")])
            port = (await home.event(30))["seen"].split()[1]
            await lab.run("b", [PYTHON, "-c", textwrap.dedent(late), "10.77.0.1", port])
            assert (await home.event(30))["heard"] == ("knock" if kind == "full-cone" else "")
            # nobody reaches a port that was never used
            assert (await asked(lab, "a", "home", patience_s=0.5)) == ["nothing"]

    asyncio.run(main())


def test_tcp_passes_address_translation_whole() -> None:
    topology = topology_of({"nodes": {"home": {"nat": "symmetric", "profile": "lan"}, "a": "infiniband"}})
    server = """
        import hashlib, socket
        s = socket.create_server(("0.0.0.0", 9000)); print("{}", flush=True); c, peer = s.accept(); h = hashlib.sha256()
        while data := c.recv(65536): h.update(data)
        c.sendall(f"{peer[0]} {h.hexdigest()}".encode())
    """
    client = """
        import hashlib, random, socket, sys
        data = random.Random(1).randbytes(3_000_000); s = socket.create_connection((sys.argv[1], 9000)); s.sendall(data)
        s.shutdown(1); print(s.recv(200).decode() == f"10.77.0.1 {hashlib.sha256(data).hexdigest()}")
    """

    async def main() -> None:
        async with Lab(topology) as lab:
            await (await lab.start("a", [PYTHON, "-c", textwrap.dedent(server)])).event(30)
            done = await lab.run("home", [PYTHON, "-c", textwrap.dedent(client), lab.address("a")])
            assert done.stdout == "True\n", done.stderr

    asyncio.run(main())


def test_a_process_knows_where_it_is_and_ends_with_the_lab() -> None:
    async def main() -> int:
        async with Lab(parse_topology("lan:2"), "mine") as lab:
            told = json.dumps({"n1": lab.address("n1"), "n2": lab.address("n2")})
            done = await lab.run(
                "n2", ["sh", "-c", 'echo "$LAB_NAME $LAB_NODE $LAB_ADDRESS $LAB_ADDRESSES"; echo oh >&2; exit 3']
            )
            assert (done.code, done.stdout, done.stderr) == (3, f"mine n2 {lab.address('n2')} {told}\n", "oh")
            with pytest.raises(LabError, match="no node 'n9'"):
                await lab.run("n9", ["true"])
            with pytest.raises(UsageError, match="no setting 'speed'"):
                await lab.set("n1", speed=3)
            with pytest.raises(LabError, match="ended early with exit code 127"):
                await (await lab.start("n1", ["no-such-program"])).event(10)
            with pytest.raises(DeadlineExceeded, match="has not ended within"):
                await lab.run("n1", ["sleep", "100"], timeout_s=0.2)
            return (await lab.start("n1", ["sleep", "100"])).pid

    assert not Path(f"/proc/{asyncio.run(main())}").exists()


def test_what_a_crash_left_is_swept_and_nothing_else() -> None:
    folder = lab_folder("crashed")
    emulator, process, _ = start(folder, parse_topology("lan"), lifeline=False)
    inside = subprocess.Popen(emulator.command("n1", ["sleep", "100"]), env={**os.environ, **emulator.environment("n1")})
    other = subprocess.Popen(["sleep", "100"], env={**os.environ, MARK: "another"})
    try:
        with pytest.raises(LabError, match="is up already"):
            start(folder, parse_topology("lan"), lifeline=False)
        until = time.monotonic() + 20
        while Path(f"/proc/{inside.pid}/comm").read_text() != "sleep\n" and time.monotonic() < until:
            os.sched_yield()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(LabError, match="is not up"):
            connect(folder)
        assert folder.sweep() == [inside.pid]
        assert inside.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for child in (inside, other):
            child.kill()
            child.wait()
        folder.sweep()


def test_a_lab_dies_with_whoever_made_it(tmp_path: Path) -> None:
    program = """
        import asyncio
        from farflung.lab.net import Lab, parse_topology
        async def main():
            async with Lab(parse_topology("lan"), "orphan") as lab:
                process = await lab.start("n1", ["sleep", "100"])
                print(process.pid, flush=True)
                await asyncio.sleep(100)
        asyncio.run(main())
    """
    maker = subprocess.Popen([PYTHON, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    inside = int(maker.stdout.readline())
    maker.kill()
    maker.wait()
    maker.stdout.close()
    folder = lab_folder("orphan")
    until = time.monotonic() + 20
    while time.monotonic() < until and (folder.pid is not None or _alive(inside)):
        time.sleep(0.01)
    assert folder.pid is None
    assert not _alive(inside)
    folder.sweep()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_labs_with_the_same_addresses_do_not_hear_each_other() -> None:
    async def main() -> None:
        async with Lab(parse_topology("infiniband:2"), "one") as one, Lab(parse_topology("infiniband:2"), "two") as two:
            await echo(one, "n2")
            assert (await asked(one, "n1", "n2"))[0] != "nothing"
            done = await two.run("n1", [PYTHON, "-c", ASK, "0", "0.5", two.address("n2")])
            assert done.stdout.split() != [two.address("n1")]
            assert "nothing" in done.stdout or "refused" in done.stderr

    asyncio.run(main())

"""The running emulator: started, asked, and entered."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from farflung.core.errors import LabError, LabUnavailable
from farflung.lab.net.building import emulator_binary
from farflung.lab.net.program import program
from farflung.lab.net.registry import MARK, LabFolder, not_up
from farflung.lab.net.topology import Topology

START_TIMEOUT_S = 60.0
CONTROL_TIMEOUT_S = 10.0

CONGESTION_CONTROL = Path("/proc/sys/net/ipv4")


@dataclass(frozen=True)
class Place:
    """Where a node is: its own address, the one that others see, and how to get inside.

    Attributes:
        address: its own; ``public`` is another one behind NAT.
        nat: the kind, or ``none``.
        space: the emulator's file descriptor of its network namespace.
    """

    name: str
    address: str
    public: str
    nat: str
    space: int


@dataclass(frozen=True)
class Emulator:
    """A running emulator as its socket tells of it."""

    folder: LabFolder
    pid: int
    user_namespace: bool
    places: Mapping[str, Place]

    def place(self, node: str) -> Place:
        """Raises LabError for a node that is not there."""
        if node not in self.places:
            some = ", ".join(list(self.places)[:8])
            raise LabError(f"lab {self.folder.name!r} has no node {node[:40]!r}", hint=f"its nodes: {some}")
        return self.places[node]

    def command(self, node: str, argv: Sequence[str]) -> list[str]:
        """``argv`` as a command that runs inside ``node``. It replaces itself by ``argv[0]``: same pid, same signals."""
        place = self.place(node)
        inside = [str(self.pid), str(place.space), str(int(self.user_namespace))]
        return [str(emulator_binary()), "enter", *inside, "--", *argv]

    def environment(self, node: str) -> dict[str, str]:
        """What a command inside ``node`` finds in its environment beside the usual."""
        addresses = {name: place.public for name, place in self.places.items()}
        return {
            MARK: self.folder.mark,
            "LAB_NAME": self.folder.name,
            "LAB_NODE": node,
            "LAB_ADDRESS": self.place(node).address,
            "LAB_ADDRESSES": json.dumps(addresses),
        }

    def tell(self, *lines: str) -> None:
        """Raises LabError where the emulator refuses a line or does not answer."""
        ask(self.folder, *lines)

    def stats(self) -> dict[str, Any]:
        """Settings and counters of every node, cuts, and how punctual the emulator is."""
        found: dict[str, Any] = json.loads(ask(self.folder, "stats")[0])
        return found


def start(folder: LabFolder, topology: Topology, *, lifeline: bool) -> tuple[Emulator, subprocess.Popen[bytes], list[str]]:
    """Starts a network; with ``lifeline`` it ends when the process's stdin closes, however that happens.

    Returns:
        the emulator, its process, and what the kernel would not set in a node.

    Raises:
        LabUnavailable: this machine cannot have a network of its own.
        LabError: a lab of that name runs.
    """
    binary = emulator_binary()
    folder.create()
    try:
        _allow_congestion_control()
        with folder.log.open("wb") as log:
            process = subprocess.Popen(
                [str(binary), "run", str(folder.socket), *(["--lifeline"] if lifeline else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        try:
            (folder.path / "pid").write_text(str(process.pid))
            answer = _start(process, topology, folder)
        except BaseException:
            process.kill()
            process.wait()
            raise
    except BaseException:
        folder.sweep()
        raise
    if not lifeline and process.stdin is not None:
        process.stdin.close()
    return _emulator(folder, answer), process, list(answer["complaints"])


def connect(folder: LabFolder) -> Emulator:
    """The running lab of that folder. Raises LabError."""
    return _emulator(folder, json.loads(ask(folder, "spaces")[0]))


def ask(folder: LabFolder, *lines: str) -> list[str]:
    """The answers to ``lines``, one each. Raises LabError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(CONTROL_TIMEOUT_S)
        try:
            connection.connect(str(folder.socket))
            connection.sendall("".join(f"{line}\n" for line in lines).encode())
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
        except (FileNotFoundError, ConnectionRefusedError):
            raise not_up(folder.name) from None
        except OSError as error:
            raise LabError(
                f"the emulator of lab {folder.name!r} does not answer: {error}", hint="'farflung lab down' ends it"
            ) from error
    found = answer.splitlines()
    for line in found:
        if line.startswith("error: "):
            raise LabError(f"lab {folder.name!r}: {line.removeprefix('error: ')}")
    return found


def _emulator(folder: LabFolder, told: Mapping[str, Any]) -> Emulator:
    places = {name: Place(name, at["address"], at["public"], at["nat"], at["space"]) for name, at in told["nodes"].items()}
    return Emulator(folder, told["pid"], told["user_namespace"], places)


def _start(process: subprocess.Popen[bytes], topology: Topology, folder: LabFolder) -> dict[str, Any]:
    stdin, stdout = _pipes(process)
    try:
        stdin.write("".join(f"{line}\n" for line in program(topology)).encode())
        stdin.flush()
    except BrokenPipeError:
        pass  # it has ended; why stands in its log
    ready, _, _ = select.select([stdout], [], [], START_TIMEOUT_S)
    line = stdout.readline() if ready else b""
    if not line:
        said = folder.log.read_text(errors="replace").strip() or f"nothing within {START_TIMEOUT_S:.0f} s"
        raise LabUnavailable(f"the network emulator did not start: {said}", hint=_hint(said))
    found: dict[str, Any] = json.loads(line)
    return found


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        raise LabError("the emulator was started without pipes")
    return process.stdin, process.stdout


def _hint(said: str) -> str:
    if "/dev/net/tun" in said:
        return "the device must exist and be open to you: 'modprobe tun', then run as root or 'chmod 666 /dev/net/tun'"
    if "namespace" in said:
        return "run as root, or allow unprivileged user namespaces (sysctl user.max_user_namespaces, unprivileged_userns_clone)"
    return ""


def _allow_congestion_control() -> None:
    """Lets nodes choose any algorithm of this machine: a namespace may only default to what unprivileged programs may use.

    A setting of the whole machine, and root's to make; without it nodes keep the machine's own algorithm, and ``up`` says so.
    """
    try:
        available = (CONGESTION_CONTROL / "tcp_available_congestion_control").read_text().split()
        allowed = CONGESTION_CONTROL / "tcp_allowed_congestion_control"
        if os.geteuid() == 0 and not set(available) <= set(allowed.read_text().split()):
            allowed.write_text(" ".join(available))
    except OSError:
        return  # a container without the right: as for other users

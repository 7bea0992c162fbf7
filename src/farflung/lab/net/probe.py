"""Measures the way between two nodes from inside them: ``python -m farflung.lab.net.probe`` (``farflung lab check`` runs it).

    serve ADDRESS            echoes UDP and swallows TCP, each on a port of its own; ends with its stdin
    rtt ADDRESS PORT N GAP   N datagrams, one every GAP seconds
    tcp ADDRESS PORT S       a stream for S seconds; what arrived after the first half of it counts
    udp ADDRESS PORT S MBPS  datagrams at that rate
    count                    bytes that have come in, by the kernel's count

Every answer is a line of JSON. Only the standard library, and the kernel's own TCP: what is measured is the network.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

LAST_WAIT_S = 1.5
"""For echoes that are still under way when the last datagram is out."""

CHUNK = 1 << 17
DATAGRAM = 1472
"""Payload that makes a packet of 1500 bytes."""

BURST_S = 0.002


def serve(address: str) -> None:
    echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    echo.bind((address, 0))
    sink = socket.create_server((address, 0))
    for loop in (lambda: _echo(echo), lambda: _swallow(sink)):
        threading.Thread(target=loop, daemon=True).start()
    _say({"udp": echo.getsockname()[1], "tcp": sink.getsockname()[1]})
    sys.stdin.read()


def _echo(echo: socket.socket) -> None:
    while True:
        data, sender = echo.recvfrom(2048)
        if len(data) <= 64:  # a flood is not echoed
            echo.sendto(data, sender)


def _swallow(sink: socket.socket) -> None:
    """Answers each stream with its payload rate in Mbps over the second half of the seconds that its first line announces."""
    while True:
        stream, _ = sink.accept()
        with stream:
            seconds = float(stream.recv(64).split(b"\n")[0])
            began, counted_from, received = time.monotonic(), 0.0, 0
            while data := stream.recv(CHUNK):
                since = time.monotonic() - began
                if since > seconds:
                    continue  # what had been queued
                if since >= seconds / 2:
                    counted_from, received = counted_from or since, received + (len(data) if counted_from else 0)
                    last = since
            rate = received * 8e-6 / (last - counted_from) if received else 0.0
            stream.sendall(json.dumps({"mbps": rate}).encode())


def rtt(address: str, port: int, count: int, gap_s: float) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((address, port))
    times_ms: list[float] = []
    seen: set[int] = set()

    def receive() -> None:
        while len(seen) < count:
            number, sent = struct.unpack("!Id", sock.recv(64))
            if number not in seen:
                seen.add(number)
                times_ms.append(1e3 * (time.perf_counter() - sent))

    receiver = threading.Thread(target=receive, daemon=True)
    receiver.start()
    began = time.perf_counter()
    for number in range(count):
        time.sleep(max(0.0, began + number * gap_s - time.perf_counter()))
        sock.send(struct.pack("!Id", number, time.perf_counter()))
    receiver.join(LAST_WAIT_S)
    _say({"sent": count, "times_ms": list(times_ms)})


def tcp(address: str, port: int, seconds: float) -> None:
    with socket.create_connection((address, port), timeout=10) as stream:
        stream.sendall(f"{seconds}\n".ljust(64).encode())
        until, data = time.monotonic() + seconds, bytes(CHUNK)
        while time.monotonic() < until:
            stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        stream.settimeout(30)
        _say(json.loads(stream.recv(200)))


def udp(address: str, port: int, seconds: float, mbps: float) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((address, port))
    data, per_s = bytes(DATAGRAM), mbps * 125_000 / (DATAGRAM + 28)
    began, sent = time.monotonic(), 0
    while (since := time.monotonic() - began) < seconds:
        while sent < since * per_s:
            sock.send(data)
            sent += 1
        time.sleep(BURST_S)
    _say({"sent": sent})


def count() -> None:
    text = Path("/proc/net/dev").read_text()
    received = int(text.split("wan0:")[1].split()[0])
    _say({"bytes": received, "at_s": time.monotonic()})


def _say(what: dict[str, object]) -> None:
    print(json.dumps(what), flush=True)


def main(words: list[str]) -> None:
    commands: dict[str, Callable[[], None]] = {
        "serve": lambda: serve(words[1]),
        "rtt": lambda: rtt(words[1], int(words[2]), int(words[3]), float(words[4])),
        "tcp": lambda: tcp(words[1], int(words[2]), float(words[3])),
        "udp": lambda: udp(words[1], int(words[2]), float(words[3]), float(words[4])),
        "count": count,
    }
    commands[words[0]]()


if __name__ == "__main__":
    main(sys.argv[1:])

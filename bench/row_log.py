"""What it costs a stage to keep and digest what it sends: per decode row, per prompt chunk, and when memory is full.

    python -m bench.row_log [--json]

Medians of one run over rows of 4,176 bytes (int8, width 4096) and 952 bytes (int8, width 896). Targets: a decode row is logged
in < 5 us and hashed in < 3 us; a chunk of 512 rows is hashed and chained in < 1.5 ms. ``spill`` is what the event loop waits
while rows move to disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from farflung.core.ids import SessionId
from farflung.node.log_budget import LogBudget, LogConfig
from farflung.node.row_log import RowLog
from farflung.protocol.digests import EdgeRows, row_hashes

CHUNK = 512
ROOMY = LogConfig(memory_bytes=1 << 30)


def new_log(budget: LogBudget) -> RowLog:
    return budget.open(SessionId("5e" * 16), lambda session, complete_from: None)


def median_us(calls: list[Callable[[], object]]) -> float:
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def log_costs(row_bytes: int, rows: int, times: int) -> dict[str, float]:
    log, payload = new_log(LogBudget(ROOMY)), os.urandom(row_bytes * rows)
    slots = [range(first, first + rows) for first in range(0, rows * times, rows)]
    return {
        "append_us": median_us([lambda part=part: log.append(part, payload) for part in slots]),
        "payload_us": median_us([lambda part=part: log.payload(part) for part in slots]),
        "commit_us": median_us([lambda part=part: log.commit(part) for part in slots]),
    }


def digest_costs(row_bytes: int, rows: int, times: int) -> dict[str, float]:
    payload, edge, slots = os.urandom(row_bytes * rows), EdgeRows(), range(rows)
    hashes = row_hashes(payload, rows)
    return {
        "hash_us": median_us([lambda: row_hashes(payload, rows)] * times),
        "chain_us": median_us([lambda: edge.crossed(slots, hashes).commit(slots)] * times),
    }


def spill_costs(row_bytes: int, rows: int, total: int, folder: Path) -> dict[str, float]:
    """``total`` bytes through a log with 4 MiB of memory: the calls that wrote, all calls, and reading it all back."""
    budget = LogBudget(LogConfig(memory_bytes=4 << 20, directory=folder))
    log, waits, spent = new_log(budget), [], 0.0
    first, stop = 0, total // row_bytes
    while first < stop:
        payload, slots, before = os.urandom(row_bytes * rows), range(first, first + rows), budget.disk_used
        start = time.perf_counter()
        log.append(slots, payload)
        log.commit(slots)
        wait = time.perf_counter() - start
        spent += wait
        if budget.disk_used > before:
            waits.append(wait)
        first += rows
    start = time.perf_counter()
    for at in range(0, first - CHUNK, CHUNK):
        log.payload(range(at, at + CHUNK))
    reading = time.perf_counter() - start
    budget.close()
    return {
        "spill_us": statistics.median(waits) * 1e6,
        "spill_max_us": max(waits) * 1e6,
        "write_mb_s": first * row_bytes / spent / 1e6,
        "read_mb_s": first * row_bytes / reading / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for row_bytes in (4176, 952):
            for rows, times in ((1, 4000), (CHUNK, 40)):
                found[f"{rows} x {row_bytes} B"] = {
                    **log_costs(row_bytes, rows, times),
                    **digest_costs(row_bytes, rows, times),
                    **spill_costs(row_bytes, rows, 64 << 20, Path(folder) / "log"),
                }
    if options.json:
        print(json.dumps(found))
        return
    for name, costs in found.items():
        print(name)
        for what, figure in costs.items():
            print(f"    {what:<14}{figure:10.2f}")


if __name__ == "__main__":
    main()

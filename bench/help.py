"""How soon the command line answers: ``python -m bench.help [--json]``.

Starts each command in a fresh process, in turns with an empty Python, and compares medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

ROUNDS = 9
TARGET_S = 0.5
EMPTY = "python -c pass"
COMMANDS = {
    EMPTY: ["-c", "pass"],
    "farflung --help": ["-m", "farflung", "--help"],
    "farflung node --help": ["-m", "farflung", "node", "--help"],
    "farflung --version": ["-m", "farflung", "--version"],
}


def measure() -> list[dict[str, object]]:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - started)
    empty = statistics.median(times[EMPTY])
    return [
        {
            "command": name,
            "median_s": round(statistics.median(taken), 3),
            "min_s": round(min(taken), 3),
            "times_an_empty_python": round(statistics.median(taken) / empty, 1),
            "target_s": TARGET_S if name == "farflung --help" else None,
        }
        for name, taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure()
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items() if value is not None))


if __name__ == "__main__":
    main()

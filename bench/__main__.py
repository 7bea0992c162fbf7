"""Runs every bench of this folder, one after the other: ``python -m bench`` (some minutes, and only on a quiet machine)."""

import subprocess
import sys

BENCHES = (
    ["-m", "bench.codecs"],
    ["-m", "bench.sampling"],
    ["-m", "bench.row_log"],
    ["-m", "bench.transport"],
    ["-m", "bench.hops"],
    ["-m", "farflung", "bench", "stage", "--model", "qwen2.5-coder-0.5b"],
    ["-m", "bench.loopback"],
    ["-m", "bench.many"],
)

for arguments in BENCHES:
    print(f"\n== python {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, *arguments], check=True)

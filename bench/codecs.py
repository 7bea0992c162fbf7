"""Time of the activation codecs on this machine, one thread: ``python -m bench.codecs [--json]``.

Each figure is the best of several medians, in microseconds per row: what the code costs, not what else the machine did.
``torch ops`` are int8 and int4 by torch's operators, the path of devices that are no CPU, run here on the CPU for comparison.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from farflung.engine import codec as torch_codec
from farflung.wire.codec import CODEC_NAMES, codec

WIDTHS = (640, 896, 4096)
ROWS = (1, 512)
ROUNDS, CALLS = 7, 15
TARGETS_US = {("encode", 4096, 1): 40.0, ("decode", 4096, 1): 20.0, ("encode", 4096, 512): 10.0, ("decode", 4096, 512): 10.0}


def best_median_us(call: Callable[[], object]) -> float:
    """Smallest of ``ROUNDS`` medians of ``CALLS`` timings, each of enough calls that the clock's step does not count."""
    call()
    began = time.perf_counter()
    call()
    repeat = max(1, int(2e-4 / (time.perf_counter() - began)))

    def once() -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - start) / repeat

    return 1e6 * min(statistics.median(once() for _ in range(CALLS)) for _ in range(ROUNDS))


def rows_like_a_model(rows: int, width: int) -> torch.Tensor:
    """Normal values with two that are a thousand times the rest, as in a first token's row."""
    values = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    values[:, [3, width // 2]] *= 1000
    return torch.from_numpy(values)


def measure() -> list[dict[str, object]]:
    found: list[dict[str, object]] = []

    def add(implementation: str, name: str, direction: str, rows: torch.Tensor, call: Callable[[], object]) -> None:
        n, width = rows.shape
        per_row = best_median_us(call) / n
        target = TARGETS_US.get((direction, width, n)) if implementation == "engine" else None
        found.append(
            {
                "implementation": implementation,
                "codec": name,
                "direction": direction,
                "width": width,
                "rows": n,
                "us_per_row": round(per_row, 2),
                "target_us": target,
                "bytes_per_row": codec(name).row_bytes(width),
            }
        )

    for width, n in itertools.product(WIDTHS, ROWS):
        rows = rows_like_a_model(n, width)
        lower = rows.bfloat16()
        for name in CODEC_NAMES:
            coded = torch_codec.encode(name, rows)
            add("engine", name, "encode", rows, partial(torch_codec.encode, name, rows))
            add("engine", name, "decode", rows, partial(torch_codec.decode, name, coded, width))
        coded = torch_codec.encode("bf16", lower)
        add("bf16 tensor", "bf16", "encode", rows, partial(torch_codec.encode, "bf16", lower))
        add("bf16 tensor", "bf16", "decode", rows, partial(torch_codec.decode, "bf16", coded, width, dtype=torch.bfloat16))
        for name, on_device in torch_codec.ON_DEVICE.items():
            raw = torch.frombuffer(bytearray(torch_codec.encode(name, rows)), dtype=torch.uint8).view(n, -1)
            add("torch ops", name, "encode", rows, partial(on_device.encode, rows))
            add("torch ops", name, "decode", rows, partial(on_device.decode, raw, width))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    found = measure()
    if as_json:
        print(json.dumps({"codecs": found}))
        return
    print(f"{'path':12} {'codec':6} {'':7} {'width':>6} {'rows':>5} {'us/row':>8} {'target':>7}")
    for row in found:
        target = "" if row["target_us"] is None else f"< {row['target_us']:g}"
        print(
            f"{row['implementation']:12} {row['codec']:6} {row['direction']:7} {row['width']:6} {row['rows']:5} "
            f"{row['us_per_row']:8.2f} {target:>7}"
        )


if __name__ == "__main__":
    main()

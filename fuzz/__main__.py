"""Runs one target under atheris (libFuzzer): ``python -m fuzz frames --seconds 900 [--corpus DIR]``.

The corpus begins with the seeds and grows in ``--corpus`` (``.fuzz/<target>`` by default, kept between runs). An input that
breaks the target ends the run with an error and is left in ``fuzz/regressions/<target>``: mend the code, keep the file.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

MAX_INPUT_BYTES = 4096
MEMORY_MB = 1024
ONE_ALLOCATION_MB = 64
SECONDS_PER_INPUT = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("frames", "records"))
    parser.add_argument("--seconds", type=int, default=60, help="time to search (default %(default)s)")
    parser.add_argument("--corpus", type=Path, help="folder of inputs that reach new code")
    arguments = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("error: atheris is not installed\nhint: pip install -e '.[fuzz]' (Linux, Python 3.11 to 3.13)")

    with atheris.instrument_imports(include=["farflung", "starlette"]):
        from fuzz.seeds import SEEDS
        from fuzz.targets import TARGETS

    corpus: Path = arguments.corpus or Path(".fuzz") / arguments.target
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS[arguments.target]():
        (corpus / f"seed-{hashlib.sha256(seed).hexdigest()[:16]}").write_bytes(seed)
    found = HERE / "regressions" / arguments.target
    found.mkdir(parents=True, exist_ok=True)
    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            str(found),
            f"-artifact_prefix={found}/",
            f"-max_total_time={arguments.seconds}",
            f"-max_len={MAX_INPUT_BYTES}",
            f"-rss_limit_mb={MEMORY_MB}",
            f"-malloc_limit_mb={ONE_ALLOCATION_MB}",
            f"-timeout={SECONDS_PER_INPUT}",
            "-print_final_stats=1",
        ],
        TARGETS[arguments.target],
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()

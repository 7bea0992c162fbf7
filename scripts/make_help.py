"""Prints the targets of the Makefile with their comments."""

import re
from pathlib import Path

for line in (Path(__file__).resolve().parent.parent / "Makefile").read_text().splitlines():
    if found := re.match(r"([a-z-]+):.*## (.*)", line):
        print(f"make {found[1]:<11} {found[2]}")

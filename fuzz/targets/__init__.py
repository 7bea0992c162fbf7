"""What is fuzzed, by name: functions that take any bytes and return, unless a promise is broken."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.targets.frames import frames
from fuzz.targets.records import records

TARGETS: dict[str, Callable[[bytes], None]] = {"frames": frames, "records": records}

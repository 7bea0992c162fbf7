"""What a stage tells a session's owner at its end: counts, times, and digests of the rows that came in and went out."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from farflung.core.ids import NodeId
from farflung.core.messages import Report, Window
from farflung.protocol.digests import EdgeRows, row_hashes
from farflung.protocol.events import Settled


class Meter:
    """Of one session."""

    def __init__(self, node_id: NodeId) -> None:
        self._report = Report(node_id)
        self._rows_in = EdgeRows()
        self._rows_out = EdgeRows()

    @property
    def report(self) -> Report:
        """As things stand."""
        return replace(
            self._report,
            committed_tokens=self._rows_in.digest.tokens,
            digest_in=self._rows_in.digest.value,
            digest_out=self._rows_out.digest.value if self._rows_out.digest.tokens else b"",
        )

    def received(self, slots: Sequence[int], payload: bytes | memoryview) -> None:
        """These rows came from the predecessor."""
        if slots:
            self._rows_in = self._rows_in.crossed(slots, row_hashes(payload, len(slots)))

    def computed(self, window: Window, slots: Sequence[int], rows: bytes | None, step_ms: float) -> None:
        """A window came back from a step of that time, with rows for the successor."""
        if slots and rows:
            self._rows_out = self._rows_out.crossed(slots, row_hashes(rows, len(slots)))
        was, decode = self._report, int(window.is_decode)
        self._report = replace(
            was,
            windows=was.windows + 1,
            rows=was.rows + window.rows,
            compute_ms=was.compute_ms + step_ms,
            decode_windows=was.decode_windows + decode,
            decode_compute_ms=was.decode_compute_ms + step_ms * decode,
        )

    def settled(self, settled: Settled, *, is_tail: bool) -> None:
        """Rows are committed, others dead."""
        self._rows_in = self._rows_in.commit(settled.slots).drop(settled.died)
        if not is_tail:
            self._rows_out = self._rows_out.commit(settled.slots).drop(settled.died)

    def sent(self, size: int, *, is_decode: bool) -> None:
        """A frame of ``size`` bytes went on."""
        was = self._report
        self._report = replace(was, bytes_out=was.bytes_out + size, decode_bytes_out=was.decode_bytes_out + size * is_decode)

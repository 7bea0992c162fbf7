"""The digests of an edge: what they depend on, and what they must not depend on."""

from __future__ import annotations

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import ProtocolViolation
from farflung.protocol.digests import EdgeDigest, EdgeRows, row_hash, row_hashes

ROWS = st.lists(st.binary(min_size=6, max_size=6), max_size=200)


def by_the_book(rows: list[bytes], start: int = 0) -> bytes:
    """The definition, written down once more without regard to cost."""
    value = bytes(32)
    for first in range(0, len(rows), 64):
        hashes = b"".join(blake3(row).digest()[:16] for row in rows[first : first + 64])
        value = blake3(value + (start + first).to_bytes(8, "little") + hashes).digest()
    return value


@given(ROWS, st.data())
def test_the_digest_depends_on_the_committed_rows_and_not_on_how_windows_merged_or_split(
    rows: list[bytes], data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, 1000))
    digest = EdgeDigest(tokens=start)
    at = 0
    while at < len(rows):
        count = data.draw(st.integers(1, 100))
        part = rows[at : at + count]
        digest = digest.extend(row_hashes(b"".join(part), len(part)))
        at += count
        assert digest.value == by_the_book(rows[:at], start)
    assert (digest.tokens, digest.value) == (start + len(rows), by_the_book(rows, start))
    assert len(digest.tail) < 64 * 16


@given(ROWS.filter(bool), st.data())
def test_guesses_that_die_and_rows_that_cross_twice_leave_no_trace(rows: list[bytes], data: st.DataObject) -> None:
    edge = EdgeRows()
    slot = at = 0
    while at < len(rows):
        count = data.draw(st.integers(1, min(8, len(rows) - at)))
        right = range(slot, slot + count)
        wrong = range(slot + count, slot + count + data.draw(st.integers(0, 3)))
        slot += count + len(wrong)
        coded = b"".join(rows[at : at + count])
        edge = edge.crossed(right, row_hashes(coded, count))
        edge = edge.crossed(wrong, row_hashes(bytes(6 * len(wrong)), len(wrong)))
        if data.draw(st.booleans()):
            edge = edge.crossed(right, row_hashes(bytes(len(coded)), count))
        committed = data.draw(st.integers(0, count))
        edge = edge.commit(right[:committed]).drop(wrong).commit(right[committed:])
        at += count
    assert edge == EdgeRows(EdgeDigest().extend(row_hashes(b"".join(rows), len(rows))))
    assert not edge.alive


@given(ROWS.filter(lambda rows: len(rows) >= 2), st.data())
def test_any_changed_moved_or_missing_row_changes_the_digest(rows: list[bytes], data: st.DataObject) -> None:
    value = EdgeDigest().extend([row_hash(row) for row in rows]).value
    at = data.draw(st.integers(0, len(rows) - 1))
    changed = [*rows[:at], bytes(byte ^ 1 for byte in rows[at]), *rows[at + 1 :]]
    assert EdgeDigest().extend([row_hash(row) for row in changed]).value != value
    assert EdgeDigest().extend([row_hash(row) for row in rows[:-1]]).value != value
    assert EdgeDigest(tokens=1).extend([row_hash(row) for row in rows]).value != value
    moved = [*rows[1:], rows[0]]
    assert (EdgeDigest().extend([row_hash(row) for row in moved]).value == value) == (moved == rows)


def test_the_digest_of_no_rows_and_of_a_known_row_are_fixed() -> None:
    assert EdgeDigest().value == bytes(32)
    assert row_hash(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc949"  # BLAKE3's own test vector, cut
    assert EdgeDigest().extend([row_hash(b"")]).value.hex() == (
        "c0249526084c235f119cd379581a050ca7f4727bfbec19dd38c200b1f700dc6b"
    )


def test_what_cannot_be_right_is_refused() -> None:
    with pytest.raises(ProtocolViolation, match="7 bytes are not 2 rows"):
        row_hashes(b"1234567", 2)
    with pytest.raises(ProtocolViolation, match="16 bytes each"):
        EdgeDigest().extend([b"short"])
    with pytest.raises(ProtocolViolation, match="2 slots came with 1"):
        EdgeRows().crossed([1, 2], [bytes(16)])
    with pytest.raises(ProtocolViolation, match="slot 4 is committed"):
        EdgeRows().commit([4])
    assert row_hashes(b"", 0) == ()

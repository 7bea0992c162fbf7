"""Digests of the rows that crossed an edge, so that a wrong answer can later be traced to one stage (rule 10). Pure.

Both ends of an edge hash each row once, when it crosses, and chain the hashes of *committed* rows in order of position. Windows
merge and split and guesses die on the way, so the digest depends on nothing but the committed rows: equal digests at equal
``tokens`` mean that both ends saw the same bytes. The chain is

    row_hash = first 16 bytes of BLAKE3(row as coded)
    value    = BLAKE3(value before this block | position of its first row, 8 bytes little-endian | its row hashes)

over blocks of 64 rows counted from the first row of the edge; the last block may be short, and before the first row the value
is 32 zero bytes. Blocks only spare work: 64 hashes in one call, where a link of the chain per row would cost a third of hashing
the row itself. To pass off another row under the same hash takes 2^128 tries; for a sender to prepare two such rows, 2^64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from blake3 import blake3
from msgspec import Struct, field

from farflung.core.errors import ProtocolViolation

ROW_HASH_BYTES = 16

_BLOCK_BYTES = 64 * ROW_HASH_BYTES


def row_hash(row: bytes | memoryview) -> bytes:
    """16 bytes that stand for one coded row."""
    return blake3(row).digest(ROW_HASH_BYTES)


def row_hashes(rows: bytes | memoryview, count: int) -> tuple[bytes, ...]:
    """``row_hash`` of each of ``count`` rows of equal size, in order. Raises ProtocolViolation where they do not divide."""
    if count == 1:
        return (row_hash(rows),)
    size = len(rows) // count if count else 0
    if size * count != len(rows):
        raise ProtocolViolation(f"{len(rows)} bytes are not {count} rows of equal size")
    view = memoryview(rows)
    return tuple([blake3(view[at : at + size]).digest(ROW_HASH_BYTES) for at in range(0, len(rows), size or 1)])


class EdgeDigest(Struct, frozen=True):
    """The chain over the committed rows of an edge up to position ``tokens``.

    Attributes:
        tokens: position of the next row; a new edge starts at the receiver's ``have``.
        blocks: the value after the last full block, 32 bytes.
        tail: row hashes of the block that is not full yet.
    """

    tokens: int = 0
    blocks: bytes = bytes(32)
    tail: bytes = b""

    @property
    def value(self) -> bytes:
        """32 bytes that stand for all these rows and their positions."""
        return _fold(self.blocks, self.tokens, self.tail) if self.tail else self.blocks

    def extend(self, hashes: Sequence[bytes]) -> EdgeDigest:
        """With the rows of these hashes, at the positions from ``tokens`` on."""
        tail = self.tail + b"".join(hashes)
        if len(tail) != len(self.tail) + ROW_HASH_BYTES * len(hashes):
            raise ProtocolViolation(f"row hashes are not {ROW_HASH_BYTES} bytes each")
        tokens = self.tokens + len(hashes)
        if len(tail) < _BLOCK_BYTES:
            return EdgeDigest(tokens, self.blocks, tail)
        blocks, stop = self.blocks, self.tokens - len(self.tail) // ROW_HASH_BYTES
        full = len(tail) - len(tail) % _BLOCK_BYTES
        for at in range(0, full, _BLOCK_BYTES):
            stop += _BLOCK_BYTES // ROW_HASH_BYTES
            blocks = _fold(blocks, stop, tail[at : at + _BLOCK_BYTES])
        return EdgeDigest(tokens, blocks, tail[full:])


def _fold(blocks: bytes, stop: int, tail: bytes) -> bytes:
    """The value with one more block, whose last row is at position ``stop - 1``."""
    first = stop - len(tail) // ROW_HASH_BYTES
    return blake3(blocks + first.to_bytes(8, "little") + tail).digest()


class EdgeRows(Struct, frozen=True):
    """The digest of an edge with the hashes of the rows that crossed it and are not committed yet: all the state there is.

    Attributes:
        digest: of the committed rows.
        alive: row hash of each slot whose fate is open.
    """

    digest: EdgeDigest = field(default_factory=EdgeDigest)
    alive: Mapping[int, bytes] = field(default_factory=dict)

    def crossed(self, slots: Sequence[int], hashes: Sequence[bytes]) -> EdgeRows:
        """These rows, not committed yet, crossed the edge. One that crosses again after a broken connection changes nothing:
        the first stands."""
        if len(slots) != len(hashes):
            raise ProtocolViolation(f"{len(slots)} slots came with {len(hashes)} row hashes")
        return EdgeRows(self.digest, {**dict(zip(slots, hashes, strict=True)), **self.alive})

    def commit(self, slots: Sequence[int]) -> EdgeRows:
        """These slots are committed, at the positions from ``digest.tokens`` on. Raises ProtocolViolation where one of them
        never crossed the edge."""
        alive = dict(self.alive)
        try:
            hashes = [alive.pop(slot) for slot in slots]
        except KeyError as error:
            raise ProtocolViolation(f"slot {error.args[0]} is committed on an edge that its row never crossed") from None
        return EdgeRows(self.digest.extend(hashes), alive)

    def drop(self, slots: Iterable[int]) -> EdgeRows:
        """These slots are dead, whether or not their rows crossed."""
        alive = dict(self.alive)
        for slot in slots:
            alive.pop(slot, None)
        return EdgeRows(self.digest, alive)

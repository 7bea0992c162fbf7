"""What a model is made of, as one digest: a Merkle tree over configuration, tokenizer and stored tensors (DESIGN.md, rule 12).

The tree, with BLAKE3-256 as H and every variable-length value preceded by its length in eight little-endian bytes:

    leaf = H(0x00 || kind || name || dtype || dimensions || H(source bytes))     leaves sorted by (kind, name)
    node = H(0x01 || left || right)                                              an odd last node moves up as it is

*Source bytes* are the bytes as stored (quantised blocks of a GGUF tensor, the data range of a safetensors one, a whole
``config.json``), so the digest depends on no library and no dtype chosen at load time. The leading 0x00 and 0x01 keep a node
from being passed off as a leaf (RFC 6962, section 2.1). A node that holds a slice proves its part with one path per tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile

import msgspec
from blake3 import blake3

from farflung.core.errors import CorruptWeights, DigestMismatch, ModelError, NotAModel
from farflung.core.ids import ModelDigest

MAX_MANIFEST_BYTES = 256 * 1024**2
"""A million tensors need about 200 MB of JSON; more is refused before it is read."""

CONFIG, TENSOR, TOKENIZER = "config", "tensor", "tokenizer"
KINDS = (CONFIG, TENSOR, TOKENIZER)


class Leaf(msgspec.Struct, frozen=True, order=True):
    """One part of a model.

    Attributes:
        kind: ``config``, ``tensor`` or ``tokenizer``.
        name: of the stored tensor or file.
        dtype: of a tensor, as the file names it (``BF16``, ``Q4_K``); empty for others.
        shape: of a tensor, outermost dimension first; empty for others.
        hash: BLAKE3-256 of the source bytes, 64 hex digits.
    """

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    hash: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is no kind of leaf")
        if any(not 0 <= size < 2**63 for size in self.shape):
            raise ValueError(f"leaf {self.name!r} has a dimension out of range")
        if len(self.hash) != 64 or self.hash != self.hash.lower() or len(bytes.fromhex(self.hash)) != 32:
            raise ValueError(f"leaf {self.name!r} has no hash of 64 lower-case hex digits")

    def digest(self) -> bytes:
        """The leaf's hash in the tree."""
        hasher = blake3(b"\x00")
        for text in (self.kind, self.name, self.dtype):
            hasher.update(_prefixed(text.encode()))
        hasher.update(_prefixed(b"".join(size.to_bytes(8, "little") for size in self.shape)))
        return hasher.update(bytes.fromhex(self.hash)).digest()


class Sibling(msgspec.Struct, frozen=True, array_like=True):
    """One step of a proof: the hash beside the path, and the side it stands on."""

    hash: str
    on_left: bool


class ModelManifest(msgspec.Struct, frozen=True, dict=True):
    """All leaves of a model, sorted, without duplicates. Raises ValueError otherwise (msgspec turns it into its own)."""

    leaves: tuple[Leaf, ...]

    def __post_init__(self) -> None:
        if not self.leaves:
            raise ValueError("a manifest has at least one leaf")
        for left, right in zip(self.leaves, self.leaves[1:], strict=False):
            if (left.kind, left.name) >= (right.kind, right.name):
                raise ValueError(f"leaf {right.name!r} is a duplicate or out of order")

    @classmethod
    def of(cls, leaves: Iterable[Leaf]) -> ModelManifest:
        return cls(tuple(sorted(leaves)))

    @cached_property
    def _levels(self) -> list[list[bytes]]:
        levels = [[leaf.digest() for leaf in self.leaves]]
        while len(levels[-1]) > 1:
            below = levels[-1]
            above = [_node(below[i], below[i + 1]) for i in range(0, len(below) - 1, 2)]
            levels.append(above + below[len(above) * 2 :])
        return levels

    @cached_property
    def _index(self) -> dict[tuple[str, str], int]:
        return {(leaf.kind, leaf.name): index for index, leaf in enumerate(self.leaves)}

    @property
    def digest(self) -> ModelDigest:
        """The root."""
        return ModelDigest(self._levels[-1][0].hex())

    def leaf(self, kind: str, name: str) -> Leaf:
        """Raises CorruptWeights where the model has no such part."""
        index = self._index.get((kind, name))
        if index is None:
            raise CorruptWeights(f"{kind} {name!r} is no part of model {self.digest}")
        return self.leaves[index]

    def check(self, found: Leaf) -> None:
        """Raises CorruptWeights, naming the part, where ``found`` is not the part of that name."""
        known = self.leaf(found.kind, found.name)
        if known != found:
            raise CorruptWeights(
                f"{found.kind} {found.name!r} is not what the manifest says: {found.dtype} {list(found.shape)} "
                f"{found.hash[:16]}, expected {known.dtype} {list(known.shape)} {known.hash[:16]}",
                hint="the file was changed or damaged after its manifest was made; fetch it again",
            )

    def check_digest(self, expected: ModelDigest, name: str) -> None:
        """Raises DigestMismatch where the model called ``name`` is not the one expected."""
        if self.digest != expected:
            raise DigestMismatch(
                f"model {name!r} here has digest {self.digest}, but {expected} was asked for",
                hint="the swarm serves other weights, another tokenizer or another configuration under this name",
            )

    def proof(self, kind: str, name: str) -> tuple[Sibling, ...]:
        """The hashes that lead from that leaf to the root, lowest first. Raises CorruptWeights where there is no such leaf."""
        self.leaf(kind, name)
        index = self._index[(kind, name)]
        path: list[Sibling] = []
        for level in self._levels[:-1]:
            beside = index ^ 1
            if beside < len(level):
                path.append(Sibling(level[beside].hex(), on_left=beside < index))
            index //= 2
        return tuple(path)

    def save(self, path: Path) -> None:
        """Writes JSON aside and renames it, so that a reader sees all or nothing."""
        with NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".part", delete=False) as aside:
            try:
                aside.write(msgspec.json.encode(self))
                aside.close()
                Path(aside.name).replace(path)
            finally:
                Path(aside.name).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> ModelManifest:
        """Raises NotAModel where there is no such file, ModelError where it is no manifest."""
        try:
            size = path.stat().st_size
            if size > MAX_MANIFEST_BYTES:
                raise ModelError(f"manifest {path} has {size} bytes, more than {MAX_MANIFEST_BYTES}")
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise NotAModel(f"no manifest at {path}: {error.strerror}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ModelError(
                f"{path} is no manifest: {error}", hint="delete it; it is made anew from the model's files"
            ) from error


def verify_proof(leaf: Leaf, path: Sequence[Sibling], digest: ModelDigest) -> bool:
    """Whether ``leaf`` is part of the model with that digest, by the hashes of ``path`` alone."""
    found = leaf.digest()
    for sibling in path:
        beside = bytes.fromhex(sibling.hash)
        if len(beside) != 32:
            return False
        found = _node(beside, found) if sibling.on_left else _node(found, beside)
    return found.hex() == digest


def _node(left: bytes, right: bytes) -> bytes:
    return blake3(b"\x01" + left + right).digest()


def _prefixed(value: bytes) -> bytes:
    return len(value).to_bytes(8, "little") + value

"""The Merkle tree over a model's parts."""

from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from farflung.core.errors import CorruptWeights, DigestMismatch, FarflungError, ModelError, NotAModel
from farflung.core.ids import ModelDigest, parse_model_digest
from farflung.engine.manifest import KINDS, Leaf, ModelManifest, Sibling, verify_proof

HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)
LEAVES = st.builds(
    Leaf,
    kind=st.sampled_from(KINDS),
    name=st.text(max_size=12),
    dtype=st.sampled_from(["", "BF16", "Q4_K"]),
    shape=st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
    hash=HASHES,
)
MANIFESTS = st.lists(LEAVES, min_size=1, max_size=40, unique_by=lambda leaf: (leaf.kind, leaf.name)).map(ModelManifest.of)


@given(MANIFESTS)
def test_every_part_proves_itself_and_the_digest_is_a_digest(manifest: ModelManifest) -> None:
    assert parse_model_digest(manifest.digest) == manifest.digest
    for leaf in manifest.leaves:
        assert verify_proof(leaf, manifest.proof(leaf.kind, leaf.name), manifest.digest)


@given(MANIFESTS, LEAVES, st.data())
def test_no_other_part_is_proven_by_a_path(manifest: ModelManifest, other: Leaf, data: st.DataObject) -> None:
    leaf = data.draw(st.sampled_from(manifest.leaves))
    path = manifest.proof(leaf.kind, leaf.name)
    assert verify_proof(other, path, manifest.digest) == (other == leaf)
    assert not verify_proof(leaf, [*path, Sibling("00" * 32, on_left=False)], manifest.digest)


@given(MANIFESTS, st.data())
def test_the_digest_depends_on_every_field_of_every_part(manifest: ModelManifest, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(manifest.leaves) - 1))
    leaf = manifest.leaves[index]
    changed = data.draw(LEAVES.filter(lambda other: other != leaf))
    others = [other for place, other in enumerate(manifest.leaves) if place != index]
    if (changed.kind, changed.name) in {(other.kind, other.name) for other in others}:
        return
    assert ModelManifest.of([*others, changed]).digest != manifest.digest


@given(MANIFESTS, st.randoms())
def test_the_order_in_which_parts_are_found_changes_nothing(manifest: ModelManifest, random: object) -> None:
    leaves = list(manifest.leaves)
    random.shuffle(leaves)  # type: ignore[attr-defined]
    assert ModelManifest.of(leaves) == manifest


def test_the_tree_is_the_one_the_documentation_describes() -> None:
    def leaf(kind: bytes, name: bytes, dtype: bytes, dims: bytes, digest: bytes) -> bytes:
        fields = b"".join(len(field).to_bytes(8, "little") + field for field in (kind, name, dtype, dims))
        return blake3(b"\x00" + fields + digest).digest()

    a, b, c = (blake3(text).digest() for text in (b"a", b"b", b"c"))
    manifest = ModelManifest.of(
        [
            Leaf("tensor", "x", "F32", (2, 3), a.hex()),
            Leaf("config", "config.json", "", (), b.hex()),
            Leaf("tokenizer", "tokenizer.json", "", (), c.hex()),
        ]
    )
    first = leaf(b"config", b"config.json", b"", b"", b)
    second = leaf(b"tensor", b"x", b"F32", (2).to_bytes(8, "little") + (3).to_bytes(8, "little"), a)
    third = leaf(b"tokenizer", b"tokenizer.json", b"", b"", c)
    pair = blake3(b"\x01" + first + second).digest()
    assert manifest.digest == blake3(b"\x01" + pair + third).hexdigest()


@given(MANIFESTS)
def test_a_manifest_survives_its_file(manifest: ModelManifest) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        manifest.save(Path(folder, "m.json"))
        assert ModelManifest.load(Path(folder, "m.json")).digest == manifest.digest
        assert [path.name for path in Path(folder).iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b'{"leaves": []}',
        b'{"leaves": [{"kind": "tensor", "name": "a", "dtype": "", "shape": [-1], "hash": "%s"}]}' % (b"0" * 64),
        b'{"leaves": [{"kind": "tensor", "name": "a", "dtype": "", "shape": [], "hash": "xyz"}]}',
        b'{"leaves": [{"kind": "spoon", "name": "a", "dtype": "", "shape": [], "hash": "%s"}]}' % (b"0" * 64),
        b"\xff\xfe",
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "m.json").write_bytes(text)
    with pytest.raises(ModelError, match="no manifest"):
        ModelManifest.load(tmp_path / "m.json")


def test_an_absent_manifest_and_an_unknown_part_say_so(tmp_path: Path) -> None:
    with pytest.raises(NotAModel, match=r"absent\.json"):
        ModelManifest.load(tmp_path / "absent.json")
    manifest = ModelManifest.of([Leaf("tensor", "x", "F32", (1,), "0" * 64)])
    with pytest.raises(CorruptWeights, match="'y'"):
        manifest.check(Leaf("tensor", "y", "F32", (1,), "0" * 64))
    with pytest.raises(CorruptWeights, match="'x'"):
        manifest.check(Leaf("tensor", "x", "F32", (1,), "1" * 64))
    with pytest.raises(DigestMismatch, match="tiny"):
        manifest.check_digest(ModelDigest("f" * 64), "tiny")


@given(st.binary(max_size=200))
def test_garbage_in_place_of_a_manifest_raises_only_our_errors(garbage: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.json")
        path.write_bytes(garbage)
        with pytest.raises(FarflungError):
            ModelManifest.load(path)

"""Manifests of local files, remembered until a file changes, so that a node starts without hashing gigabytes again.

What is remembered is only a hint: every tensor is hashed again when a stage loads it (``ModelSource.read``), so a file changed
behind its size and time is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import platformdirs
from blake3 import blake3

from farflung.core.errors import ModelError, NotAModel
from farflung.engine.manifest import ModelManifest


def default_cache() -> Path:
    """The user's cache directory of Farflung."""
    return platformdirs.user_cache_path("farflung")


def cached_manifest(files: Collection[Path], cache: Path, make: Callable[[], ModelManifest]) -> ModelManifest:
    """The manifest remembered for exactly these files (real path, size, modification time), else what ``make`` returns."""
    place = cache / "manifests" / f"{_key(files)}.json"
    try:
        return ModelManifest.load(place)
    except NotAModel:
        pass
    except ModelError:
        place.unlink(missing_ok=True)
    manifest = make()
    with suppress(OSError):  # a cache that cannot be written costs time, not correctness
        place.parent.mkdir(parents=True, exist_ok=True)
        manifest.save(place)
    return manifest


def _key(files: Collection[Path]) -> str:
    hasher = blake3(b"manifest 1")  # counts up when the rules for leaves change
    for path in sorted(file.resolve() for file in files):
        status = path.stat()
        hasher.update(repr((str(path), status.st_size, status.st_mtime_ns)).encode())
    return hasher.hexdigest()

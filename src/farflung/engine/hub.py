"""Files of a model on the Hugging Face hub: fetched one by one when they are asked for, resumed and kept by its own library."""

from __future__ import annotations

from pathlib import Path

from farflung.core.errors import ModelError, NotAModel
from farflung.engine.source import SourceKind

PROBE_TIMEOUT_S = 2.5
"""For the one request that lists a repository. The library's own look-ups retry for 23 seconds without a network."""


class HubFiles:
    """See ``safetensors_source.Files``. All files come from one commit, that of the moment of opening.

    Where the hub cannot be reached, what the hub's cache on this machine has of the model is all there is of it.
    """

    kind: SourceKind = "hub"

    def __init__(
        self, repository: str, *, revision: str | None = None, endpoint: str | None = None, hub_cache: Path | None = None
    ) -> None:
        """Lists the repository.

        Args:
            repository: ``owner/name``.
            revision: a branch, tag or commit; None for the default branch.
            endpoint: URL of the hub; None for the library's setting.
            hub_cache: the library's cache folder; None for its setting.

        Raises NotAModel where there is no such repository or no access to it; ModelError where the hub cannot be reached and
        nothing is cached.
        """
        self.name = repository
        self._endpoint, self._cache = endpoint, hub_cache
        self._names = self._list(revision)
        if self._names is None:
            config = self._cached_config(revision)
        elif "config.json" in self._names:
            config = self._fetch("config.json", revision)  # by the branch's name: so the cache notes which commit that is
        else:
            raise NotAModel(f"{repository} on the hub is no model for transformers: it has no config.json")
        self.folder = config.parent

    def get(self, name: str) -> Path | None:
        if self._names is None or self.is_here(name):
            return self.folder / name if self.is_here(name) else None
        return self._fetch(name, self.folder.name) if name in self._names else None

    def has(self, name: str) -> bool:
        return self._names is None or name in self._names

    def is_here(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def _fetch(self, name: str, revision: str | None) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        transport_error = HfHubHTTPError.__bases__[0]  # the library's HTTP client differs between its versions
        try:
            path = hf_hub_download(
                self.name,
                name,
                revision=revision,
                endpoint=self._endpoint,
                cache_dir=self._cache,
                etag_timeout=PROBE_TIMEOUT_S,
            )
        except (transport_error, OSError) as error:
            raise ModelError(
                f"{self.name}: fetching {name} failed: {error}", hint="run it again: what has arrived is kept and resumed"
            ) from error
        return Path(path)

    def _list(self, revision: str | None) -> frozenset[str] | None:
        """Names of the files; None where the hub cannot be reached."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        transport_error = HfHubHTTPError.__bases__[0]
        try:
            found = HfApi(endpoint=self._endpoint).model_info(self.name, revision=revision, timeout=PROBE_TIMEOUT_S)
        except GatedRepoError as error:
            raise NotAModel(
                f"{self.name} is gated: its owner must grant access", hint="accept its terms on the hub, then: hf auth login"
            ) from error
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise NotAModel(
                f"{self.name!r} is no file or folder here and no model of the hub",
                hint="check the spelling; a private one needs: hf auth login",
            ) from error
        except (transport_error, OSError):
            return None
        return frozenset(file.rfilename for file in found.siblings or ())

    def _cached_config(self, revision: str | None) -> Path:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(self.name, "config.json", cache_dir=self._cache, revision=revision)
        if not isinstance(config, str):
            raise ModelError(
                f"{self.name!r} is no file or folder here, the hub cannot be reached and nothing of it is cached",
                hint="check the spelling and the network, or give the model as a folder or a .gguf file",
            )
        return Path(config)

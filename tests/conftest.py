"""Settings of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import platformdirs
import pytest
from hypothesis import settings

# Timings are not asserted in tests, so a busy machine must not fail one. HYPOTHESIS_PROFILE=long searches for hours.
settings.register_profile("default", deadline=None)
settings.register_profile("long", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests cache (manifests, tokenizers of tiny models) goes when they end; real weights come from the user's cache."""
    weights = platformdirs.user_cache_path("farflung") / "models"
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        if os.name == "posix":  # elsewhere platformdirs asks the system, whatever the environment says
            weights.mkdir(parents=True, exist_ok=True)
            (cache / "farflung").mkdir()
            (cache / "farflung" / "models").symlink_to(weights)
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield

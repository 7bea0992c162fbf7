"""Settings of the whole suite."""

import os

from hypothesis import settings

# Timings are not asserted in tests, so a busy machine must not fail one. HYPOTHESIS_PROFILE=long searches for hours.
settings.register_profile("default", deadline=None)
settings.register_profile("long", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

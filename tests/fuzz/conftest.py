"""How much the fuzz tests try: in CI the same examples each time; by `make fuzz` others, as long as it has."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.register_profile("long", settings.get_profile("ci"), derandomize=False, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("FUZZ_PROFILE", "ci"))

"""Hypothesis draws the same examples at every run: CI must not fail by luck."""

import os

from hypothesis import HealthCheck, Phase, settings


ALIKE = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("resps", **ALIKE)
settings.register_profile("mutations", phases=[Phase.generate], **ALIKE)  # finding a bug is enough
settings.load_profile(os.environ.get("RESPS_HYPOTHESIS_PROFILE", "resps"))

"""Fixtures that several test modules share, and how Hypothesis looks for examples."""

from hypothesis import HealthCheck, settings

# A run on a machine that pauses tells no more than one on a quick one, and the same tree gets the same answer.
settings.register_profile("isthmus", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("isthmus")

pytest_plugins = ("s3_server",)

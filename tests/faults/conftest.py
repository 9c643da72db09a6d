"""The fixtures of tests/system that an instance of a test's own takes."""

from __future__ import annotations

from tests.system.conftest import netns, new_instance, pytest_runtest_makereport

__all__ = ["netns", "new_instance", "pytest_runtest_makereport"]

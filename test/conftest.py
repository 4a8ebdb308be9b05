"""Settings for every test: nothing depends on how fast the machine is."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker a core: more threads would only wait for each other. Read when torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


@pytest.fixture(scope="session", autouse=True)
def ros_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what nodes write out of the user's ~/.ros."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_HOME", str(tmp_path_factory.mktemp("ros")))
        yield

"""Real sample data, found through MOE_DATA."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def real_data():
    """Path of a folder of the real sample data; the test is skipped where it is not there."""

    def find(name: str) -> Path:
        if "MOE_DATA" not in os.environ:
            pytest.skip("MOE_DATA is not set: no real sample data")
        path = Path(os.environ["MOE_DATA"]) / name
        if not path.exists():
            pytest.skip(f"{path} is not there")
        return path

    return find

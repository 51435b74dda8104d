"""The examples are importable in tests; nothing that was measured on this machine is read."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    os.environ["SHARDTENSOR_HOME"] = str(tmp_path_factory.mktemp("home"))

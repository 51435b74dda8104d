"""The examples are importable in tests; nothing that was measured on this machine is read."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    os.environ["SHARDTENSOR_HOME"] = str(tmp_path_factory.mktemp("home"))


def pytest_terminal_summary(terminalreporter):
    """One line for each campaign: what became of its cases."""
    done = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    for text in (v for r in done for k, v in r.user_properties if k == "campaign"):
        terminalreporter.write_line(text)

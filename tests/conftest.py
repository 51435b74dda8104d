"""The examples are importable in tests; nothing that was measured on this machine is read."""

import gc
import os
import sys
from contextlib import nullcontext
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from shardtensor import spec
from shardtensor.comm import transport
from shardtensor.ranks import testing
from shardtensor.tensor import aliases, layout

ROOT = Path(__file__).parent.parent
# the file and how many modules there were when all was frozen
_frozen = None
sys.path.insert(0, str(ROOT / "examples"))
sys.path.append(str(ROOT / "benchmarks"))


def pytest_addoption(parser):
    parser.addoption(
        "--backward-apart", action="store_true", help="backward runs on a thread of its own"
    )
    parser.addoption("--whole", action="store_true", help="every case on every layout")
    parser.addoption("--device", default="cpu", help="of the operands of the cases")


def pytest_configure(config):
    """Operands of the cases are made on --device; on a pretended GPU only what is raised counts."""
    if config.getoption("--device") != "cpu":
        # a mode that looks at every call
        torch.set_default_device(config.getoption("--device"))
    if os.environ.get("FAKECUDA"):
        torch.backends.cudnn.enabled = False
        testing._compare = lambda *args: None


@pytest.fixture(scope="session", autouse=True)
def backward(request):
    """Backward where --backward-apart says."""
    from threads import all_apart

    with all_apart() if request.config.getoption("--backward-apart") else nullcontext():
        yield


@pytest.fixture
def plain_transport(monkeypatch):
    """For tests that count: the strict transport has copies, messages and turns of its own."""
    monkeypatch.delenv("SHARDTENSOR_TRANSPORT", raising=False)
    transport.of_process.cache_clear()
    yield
    transport.of_process.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    os.environ["SHARDTENSOR_HOME"] = str(tmp_path_factory.mktemp("home"))


def pytest_collection_modifyitems(items):
    """Long tests come first, so that no worker is left with one in the end."""
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("slow", "gloo"))))


def _freeze(now=None):
    """What imports and other files made is not gone through by whatever collects garbage, as plans do."""
    global _frozen
    if now is None or now != _frozen:
        gc.collect()
        gc.freeze()
    _frozen = now


def pytest_collection_finish():
    _freeze()


def pytest_runtest_setup(item):
    """Worker processes are forks of one that has imported what any seed or optimizer imports, too."""
    _freeze((item.path, len(sys.modules) // 32))
    if item.get_closest_marker("gloo"):
        forkserver.set_forkserver_preload(
            ["shardtensor", "shardtensor.checkpoint", "torch._dynamo"]
        )
        # the first time
        forkserver.ensure_running()


@pytest.fixture
def command(monkeypatch, capsys):
    """The command line, run in this process: exit code, output and errors."""
    from shardtensor.cli import main

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["shardtensor", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


@pytest.fixture
def nothing_before(monkeypatch):
    """What tensors of other tests left behind is looked up at each call; here nothing is."""
    for kept in (aliases.stale, layout.turned):
        for key in list(kept):
            monkeypatch.delitem(kept, key)
    # where no shard has ever been empty nothing is asked of each call
    empty = set(spec.hollow)
    spec.hollow.clear()
    yield
    spec.hollow.update(empty)


@pytest.fixture
def in_flight(monkeypatch):
    """in_flight(Functions): exchanges are overlapped however small; a list with a 1 for each forward."""
    from shardtensor.rules import overlap

    def count(*functions):
        monkeypatch.setattr(overlap, "WORTH", 0)
        calls = []

        def counted(plain):
            return lambda *args: calls.append(1) or plain(*args)

        for function in functions:
            monkeypatch.setattr(function, "forward", staticmethod(counted(function.forward)))
        return calls

    return count


def pytest_terminal_summary(terminalreporter):
    """One line for each campaign: what became of its cases."""
    done = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    for text in (v for r in done for k, v in r.user_properties if k == "campaign"):
        terminalreporter.write_line(text)

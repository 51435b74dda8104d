"""Long and broken training in brief: flat memory, kills, starts; files that do nothing but load."""

import gc
import os
import pickle
import random
import weakref
from pathlib import Path

import endurance
import pytest
import torch
import torch.distributed as dist
from forked import ranks
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T


def long_training(steps):
    """Live tensors and resident bytes after a third of the steps and at the end."""
    mesh = T.make_mesh((dist.get_world_size(),))
    net = st.parallelize(endurance.model(), mesh)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    marks = []
    for step in range(steps):
        loss = endurance.train_step(net, optimizer, mesh, step)
        if step in (steps // 3, steps - 1):
            marks.append((endurance.live_tensors(), endurance.resident()))
    return marks, loss


@pytest.mark.gloo
def test_memory_is_flat():
    losses = set()
    for ((tensors, resident), (later, more)), loss in T.run_workers(2, long_training, 60):
        assert not later - tensors
        assert more < 1.05 * resident
        losses.add(loss)
    assert len(losses) == 1


def long_guarded_training():
    with st.guard():
        return long_training(6)


@pytest.mark.slow
def test_the_guard_keeps_nothing():
    for ((tensors, _), (later, _)), _ in st.simulate(2, long_guarded_training):
        assert later.total() <= tensors.total()  # of both ranks, wherever they are


def models_one_after_the_other():
    mesh = T.make_mesh((dist.get_world_size(),))
    gone = []
    for _ in range(2):
        net = st.parallelize(endurance.model(), mesh)
        endurance.train_step(net, torch.optim.SGD(net.parameters(), 0.1), mesh, 0)
        gone += [weakref.ref(net), weakref.ref(net[0].weight)]
        del net
        gc.collect()
    return [r() is None for r in gone]


def test_a_parallelized_model_is_freed():
    assert st.simulate(2, models_one_after_the_other) == [[True] * 4] * 2


class Forked:
    """A program as the benchmark takes it, a subprocess.Popen."""

    def __init__(self, program):
        self.program, self.send_signal = program, program.signal

    def poll(self):
        return self.program.process.exitcode

    def communicate(self, timeout):
        self.returncode, text = self.program.ended(timeout)
        return text, None


@pytest.fixture
def forks(monkeypatch):
    """The benchmark's programs are forks, which need not import the library."""

    def start(count, *args):
        return [Forked(p) for p in ranks(endurance.__file__, count, "--rank-of", *args)]

    monkeypatch.setattr(endurance, "start", start)


@pytest.mark.gloo
@pytest.mark.slow
def test_random_kills(tmp_path, forks):
    """Killed once, and every loss is that of a training that nobody disturbed."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    torn.mkdir()
    steps, every = 24, 6
    found = endurance.ended(endurance.start(2, "train", whole, steps, 0))
    assert [code for code, _ in found] == [0, 0]
    waits = endurance.broken(torn, 2, steps, every, 1, random.Random(0))
    assert len(waits) == 1 and waits[0] < 30
    for rank in range(2):
        expected, got = endurance.losses(whole, rank), endurance.losses(torn, rank)
        assert len(expected) == steps and got == expected


@pytest.mark.gloo
def test_start_and_stop(forks):
    found = endurance.ended(endurance.start(2, "cycle", *endurance.free_ports(5)))
    for code, text in found:
        assert code == 0
        early, late, tensors, later, loss = text.split()
        assert int(late) < 1.05 * int(early) and int(later) <= int(tensors)
    assert found[0][1].split()[-1] == loss


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_files_from_outside_run_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    file = tmp_path / "weights.pt"
    torch.save({"weight": Evil()}, file)
    net = nn.Linear(2, 2)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        net.load_state_dict(torch.load(file))
    assert not (tmp_path / "ran").exists()


def saved_and_loaded(folder):
    mesh = T.make_mesh((dist.get_world_size(),))
    whole = torch.randn(7, 3)
    x = st.distribute_tensor(whole, mesh, [Shard(0)])
    file = Path(folder, f"x-{dist.get_rank()}.pt")
    torch.save({"x": x}, file)
    # a plain tensor, which torch's safe loader takes
    loaded = torch.load(file, weights_only=True)["x"]
    assert type(loaded) is torch.Tensor and torch.equal(loaded, x.full_tensor())


def test_what_is_saved_loads_safely(tmp_path):
    st.simulate(3, saved_and_loaded, str(tmp_path))


def test_no_loader_of_the_library_unpickles():
    """Neither pickle nor torch.load, but with weights_only, in any module; subprocess pipes aside."""
    source = Path(st.__file__).parent
    for file in source.rglob("*.py"):
        text = file.read_text()
        # a Loader's processes are forks of this one, and send through pipes of its own
        own = file.relative_to(source).as_posix() == "io/ahead.py"
        assert own or "pickle.load" not in text, file
        assert "yaml.load(" not in text, file
        for call in text.split("torch.load(")[1:]:
            assert "weights_only=True" in call.split("\n\n")[0], file
        assert "allow_pickle=True" not in text, file

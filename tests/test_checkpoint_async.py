"""Checkpoints saved while training goes on, of random states, and from strangers."""

import errno
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict, namedtuple
from contextlib import contextmanager

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import checkpoint, locks
from shardtensor.checkpoint import partial
from shardtensor.checkpoint.states import Randomness
from shardtensor.ranks.testing import make_mesh, run_workers

Pair = namedtuple("Pair", "x y")
X = torch.arange(9 * 5, dtype=torch.float64).reshape(9, 5)


def changing(folder):
    """What is saved is the state at the call, however it changes while it is written."""
    mesh = make_mesh((dist.get_world_size(),))
    x = st.distribute_tensor(X, mesh, [Shard(0)], src_data_rank=None)
    plain, number = torch.ones(3), [1, 2]
    for step in range(3):
        saving = checkpoint.save_async(
            {"x": x, "plain": plain, "number": number, "step": step}, folder, f"{step}"
        )
        x += 100
        plain.zero_()
        number.append(3)
        # collectives of training meet none of the thread's
        assert x.sum().item() == X.sum().item() + 4500 * (step + 1)
    path = saving.wait()
    assert path == checkpoint.latest(folder)
    assert sorted(p.name for p in folder.glob("*")) == ["1", "2"]
    state = {"x": torch.zeros_like(x), "plain": torch.zeros(3), "number": [0] * 4, "step": 0}
    checkpoint.load(state, folder / "1")
    assert state["step"] == 1 and state["plain"].tolist() == [0, 0, 0]
    return state["x"].full_tensor()


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_saves_the_state_of_the_call(tmp_path, ranks):
    assert all(x.equal(X + 100) for x in run_workers(ranks, changing, tmp_path / "c"))


def test_on_simulated_ranks(tmp_path):
    assert all(x.equal(X + 100) for x in st.simulate(2, changing, tmp_path / "c"))


def test_containers_that_cannot_be_saved(tmp_path):
    """As `save` has it, once it is written."""
    state = {"pair": Pair(1, torch.ones(2))}
    with pytest.raises(RuntimeError, match="pair is Pair, and checkpoints hold tensors"):
        checkpoint.save(state, tmp_path, "a")
    with pytest.raises(RuntimeError, match="a was not saved"):
        checkpoint.save_async(state, tmp_path, "a").wait()
    checkpoint.save_async({"lock": threading.Lock()}, tmp_path, "a")
    with pytest.raises(RuntimeError, match="a was not saved") as caught:
        checkpoint.finish()
    assert "lock is lock, and checkpoints hold" in str(caught.value.__cause__)
    kept = {"n": {"size": torch.Size([1, 2]), "of": OrderedDict(x=1), "all": {1, 2}}}
    checkpoint.finish()
    checkpoint.save_async(kept, tmp_path, "b").wait()
    back = checkpoint.load({"n": {"size": 0, "of": {"x": 0}, "all": 0}}, tmp_path / "b")
    assert back == kept and type(back["n"]["size"]) is torch.Size


def failing(folder):
    checkpoint.save_async({"x": torch.ones(2)}, folder, "good").wait()
    plain = dcp.save
    dcp.save = lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full"))
    try:
        checkpoint.save_async({"x": torch.ones(2)}, folder, "bad")
        with pytest.raises(RuntimeError, match="bad was not saved") as caught:
            checkpoint.finish()
    finally:
        dcp.save = plain
    assert isinstance(caught.value.__cause__, OSError)
    assert checkpoint.latest(folder).name == "good"
    checkpoint.save_async({"x": torch.ones(2)}, folder, "next").wait()
    assert checkpoint.latest(folder).name == "next"


@pytest.mark.gloo
def test_an_error_of_the_thread_is_raised_later(tmp_path):
    run_workers(2, failing, tmp_path / "c")


def drawing(folder):
    rank = dist.get_rank()
    torch.manual_seed(rank)
    np.random.seed(rank)
    random.seed(rank)

    def draws():
        return torch.rand(2).tolist(), np.random.normal(size=3).tolist(), random.random()

    draws()
    checkpoint.save({"random": Randomness()}, folder, "r")
    after = draws()
    draws()
    checkpoint.load({"random": Randomness()}, folder / "r")
    assert draws() == after
    return after


def continued(folder):
    checkpoint.load({"random": Randomness()}, folder / "r")
    return torch.rand(2).tolist(), np.random.normal(size=3).tolist(), random.random()


@pytest.mark.gloo
def test_every_rank_continues_its_draws(tmp_path):
    after = run_workers(2, drawing, tmp_path)
    assert after[0] != after[1]
    # a third rank draws what the first does
    assert run_workers(3, continued, tmp_path) == [*after, after[0]]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_of_a_stranger_is_executed(tmp_path):
    """A pickle in place of the metadata, and one among the values."""
    proof = tmp_path / "executed"
    checkpoint.save({"x": torch.ones(2), "n": 3}, tmp_path, "good")
    dcp.save({"x": torch.ones(2), "n": Evil(proof)}, checkpoint_id=tmp_path / "bad", no_dist=True)
    with pytest.raises(RuntimeError, match=r"posix\.system"):
        checkpoint.load({"x": torch.zeros(2), "n": 0}, tmp_path / "bad")
    assert not proof.exists()
    metadata = pickle.loads((tmp_path / "good" / ".metadata").read_bytes())
    metadata.planner_data["more"] = Evil(proof)
    (tmp_path / "good" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(RuntimeError, match=r"posix\.system is not loaded"):
        checkpoint.load({"x": torch.zeros(2), "n": 0}, tmp_path / "good")
    assert not proof.exists()
    # this file would have been executed
    dcp.load({"x": torch.zeros(2)}, checkpoint_id=tmp_path / "good", no_dist=True)
    assert proof.exists()


KILLED = """
import os, sys, time, torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard
import shardtensor as st
from shardtensor import checkpoint

mesh, _ = st.init()
folder, rank = sys.argv[1], mesh.get_local_rank()
x = st.distribute_tensor(torch.full((8, 4), 1.0), mesh, [Shard(0)])
checkpoint.save({"x": x}, folder, "good")
plain = dcp.FileSystemWriter.write_data
def slow(*args, **kwargs):
    found = plain(*args, **kwargs)
    if rank == 1:
        open(os.path.join(folder, "writing"), "w").close()
        time.sleep(60)
    return found
dcp.FileSystemWriter.write_data = slow
checkpoint.save_async({"x": x + 1}, folder, "torn").wait()
"""


@pytest.mark.gloo
def test_killed_while_it_writes(tmp_path):
    """SIGKILL to a rank that has written half of a checkpoint: the one before is found."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = tmp_path / "c"
    ranks = forked.ranks(script, 2, folder)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "writing").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (folder / "writing").exists()
        ranks[1].signal(signal.SIGKILL)
        assert ranks[0].ended(60)[0] != 0
    finally:
        for r in ranks:
            r.process.kill()
    assert (folder / ".torn.partial").exists()
    assert checkpoint.latest(folder).name == "good"
    state = checkpoint.load({"x": torch.zeros(8, 4)}, folder / "good")
    assert state["x"].eq(1).all()
    checkpoint.save(state, folder, "next")
    assert not (folder / ".torn.partial").exists()
    assert checkpoint.latest(folder).name == "next"


def whole_state(path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    mesh = make_mesh((2,))
    st.parallelize(model, mesh)
    x = st.distribute_tensor(torch.randn(2, 1, 8, 8), mesh, [Shard(2)])
    model(x).square().mean().backward()
    torch.optim.AdamW(model.parameters()).step()
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), path)
    return {k: v.clone() for k, v in model.state_dict().items()}


ALONE = """
import sys, torch
from torch import nn
model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
model.load_state_dict(torch.load(sys.argv[1], weights_only=True))
assert "shardtensor" not in sys.modules
print(sum(p.double().sum().item() for p in model.parameters()))
"""


@pytest.mark.gloo
def test_a_plain_script_loads_the_state_dict(tmp_path):
    state = run_workers(2, whole_state, tmp_path / "model.pt")[0]
    found = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "model.pt"], capture_output=True, text=True
    )
    want = sum(v.double().sum().item() for k, v in state.items() if k.endswith(("weight", "bias")))
    assert float(found.stdout) == pytest.approx(want, rel=1e-12), found.stderr


def test_another_program_in_the_folder(tmp_path):
    """What it writes is not removed; under its name nothing else is written meanwhile."""
    other = tmp_path / ".b.partial"
    other.mkdir()
    lock = tmp_path / ".b.partial.lock"
    held = locks.take(lock)

    def run():
        checkpoint.save({"a": 1}, tmp_path, "a")
        with pytest.raises(FileExistsError, match="b is being written by another program"):
            checkpoint.save({"a": 1}, tmp_path, "b")

    st.simulate(2, run)
    assert other.exists()
    # it is killed
    os.close(held)
    st.simulate(2, lambda: checkpoint.save({"a": 1}, tmp_path, "b"))
    assert checkpoint.latest(tmp_path) == tmp_path / "b"
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_a_worker_forked_during_a_save_holds_nothing(tmp_path):
    """As one of a DataLoader, which lives longer than a save in a thread that fails."""
    partial.begin(tmp_path / "a")
    ends, end = os.pipe()
    if not (child := os.fork()):
        os.close(end)
        os.read(ends, 1)
        os._exit(0)
    partial.let_go(tmp_path / "a")
    try:
        checkpoint.save({"a": 1}, tmp_path, "a")
    finally:
        os.close(end)
        os.waitpid(child, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


class Full:
    """A file on a disk that is full."""

    def __init__(self, raw):
        self.raw = raw

    def __getattr__(self, name):
        return getattr(self.raw, name)

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("save", [checkpoint.save, lambda *a: checkpoint.save_async(*a).wait()])
def test_a_full_disk_is_named(tmp_path, save, monkeypatch):
    """torch's writer of archives only says that positions differ."""
    stream = FileSystem.create_stream

    @contextmanager
    def full(self, path, mode):
        with stream(self, path, mode) as raw:
            yield Full(raw) if mode == "wb" else raw

    checkpoint.save({"a": X}, tmp_path, "good")
    monkeypatch.setattr(FileSystem, "create_stream", full)
    with pytest.raises(RuntimeError) as caught:
        save({"a": X}, tmp_path, "bad")
    error = caught.value.__cause__ or caught.value
    assert "No space left" in f"{caught.value} {error} {error.__cause__}"
    assert checkpoint.latest(tmp_path) == tmp_path / "good"

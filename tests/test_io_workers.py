"""Processes that read for a loader, time that is over, and batches that do not come."""

import multiprocessing
import os
import re
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from forked import ranks
from samples import Numbers, mesh_of
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import io
from shardtensor import testing as T
from shardtensor.io import Loader
from shardtensor.io.ahead import InThread

SAMPLES = np.random.default_rng(0).normal(size=(9, 5, 4)).astype(np.float32)


@dataclass
class Sample:
    x: st.ShardTensor
    noise: torch.Tensor
    number: int
    name: str


class Fields(Numbers):
    """Rows of an array of one rank 0, 1, 4 wide or so, and draws of this process."""

    def __init__(self, url, mesh, name=None):
        super().__init__(len(SAMPLES))
        self.source, self.mesh = io.open_array(url, name), mesh["domain"]
        n = self.mesh.size()
        self.sizes = {0: [5 - (n > 1)] + [0] * (n - 2) + [1] * (n > 1)}
        # what is open before the processes are
        self.source.read([(0, 1), (0, 1), (0, 1)])

    @property
    def bytes_read(self):
        return self.source.bytes_wanted

    def __getitem__(self, i):
        x = io.read(self.source, self.mesh, [Shard(0)], index={0: i}, sizes=self.sizes)
        noise = torch.rand(2) + np.random.rand()
        return {"one": Sample(x, noise, i, f"s{i}"), "two": (x * 2, SAMPLES[i, 0])}


def every(data, n):
    fields = Rows(io.open_array(data, "t"), T.make_mesh((1,)))
    order = io.DomainSampler(n, fields.mesh, shuffle=False)
    found = [x.to_local() for x in Loader(fields, fields.mesh, sampler=order, workers=4)]
    return torch.cat(found)


class Rows(Numbers):
    def __init__(self, source, mesh):
        super().__init__(source.shape[0])
        self.source, self.mesh = source, mesh

    def __getitem__(self, i):
        return io.read(self.source, self.mesh, [Shard(0)], index={0: i})


@pytest.mark.parametrize("form", ["NETCDF3_64BIT", "NETCDF4"])
def test_files_that_xarray_has_open(tmp_path, form):
    """Forked processes have one position in such a file: each read from where others had been."""
    xr = pytest.importorskip("xarray")
    values = np.random.default_rng(0).normal(size=(60, 400)).astype(np.float32)
    xr.Dataset({"t": (("time", "x"), values)}).to_netcdf(tmp_path / "a.nc", format=form)
    with xr.open_dataset(tmp_path / "a.nc") as data:
        assert st.simulate(1, every, data, 60)[0].equal(torch.from_numpy(values))


def read(url, name, shape, workers):
    mesh = mesh_of(shape)
    data = Fields(url, mesh, name)
    before = data.bytes_read
    torch.manual_seed(5)
    loader = Loader(data, mesh, batch_size=4 // shape[0], workers=workers)
    found = {}
    for batch in loader:
        one, (two, row) = batch["one"], batch["two"]
        assert type(one) is Sample and one.x.spec == two.spec and one.x.spec.mesh == mesh["domain"]
        assert one.x.spec.sizes[1] == tuple(data.sizes[0])
        for k, i in enumerate(one.number.tolist()):
            assert one.name[k] == f"s{i}"
            np.testing.assert_array_equal(one.x.full_tensor()[k], SAMPLES[i])
            np.testing.assert_array_equal(two.full_tensor()[k], SAMPLES[i] * 2)
            np.testing.assert_array_equal(row[k], SAMPLES[i, 0])
            found[i] = one.noise[k].tolist()
    assert loader.done == len(loader) == 2
    mine = data.sizes[0][mesh.get_local_rank("domain")]
    assert loader.bytes_read - before == 4 * mine * 4 * len(found)
    return found, torch.rand(1).item()


@pytest.fixture
def urls(tmp_path):
    h5py, zarr = pytest.importorskip("h5py"), pytest.importorskip("zarr")
    np.save(tmp_path / "a.npy", SAMPLES)
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["t"] = SAMPLES
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    group.create_array("t", data=SAMPLES, chunks=(1, 2, 4))
    return [(str(tmp_path / n), v) for n, v in [("a.npy", None), ("a.h5", "t"), ("a.zarr", "t")]]


@pytest.mark.filterwarnings("ignore:.*times as many")
def test_processes_give_what_the_thread_gives(urls):
    known = {}
    for url, name, shape, workers in [
        (*urls[0], (1, 1), 1), (*urls[1], (1, 3), 2), (*urls[2], (2, 2), 1), (*urls[2], (1, 2), 2),
    ]:  # fmt: skip
        for found, drawn in st.simulate(shape[0] * shape[1], read, url, name, shape, workers):
            # a sample's draws are the same on all ranks, for any number of them and of processes
            for i, noise in found.items():
                assert known.setdefault(i, noise) == noise
            torch.manual_seed(5)
            assert drawn == torch.rand(1).item()
    assert len({tuple(n) for n in known.values()}) == len(known) >= 8


SCRIPT = """
import shardtensor as st
import test_io_workers
st.init(domain=-1)
test_io_workers.read(*sys.argv[1:], (1, 2), 2)
print("read", flush=True)
"""


@pytest.mark.gloo
@pytest.mark.filterwarnings("ignore:.*times as many")
def test_processes_of_ranks(urls, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(f"import sys\nsys.path.insert(0, {os.path.dirname(__file__)!r})\n{SCRIPT}")
    for program in ranks(script, 2, *urls[2]):
        code, text = program.ended()
        assert code == 0 and "read" in text, text


class Unsendable(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


class Bad(Numbers):
    """Sample 3 cannot be read by rank 1."""

    def __init__(self, mesh, how):
        super().__init__(6)
        self.how, self.mine = how, mesh.get_local_rank("domain")

    def __getitem__(self, i):
        if (i, self.mine) == (3, 1):
            self.how()
        return i


def bad(how, **options):
    mesh = mesh_of((1, 2))
    loader, seen = Loader(Bad(mesh, how), mesh, sampler=range(6), **options), []
    with pytest.raises(RuntimeError) as caught:
        for batch in loader:
            seen += batch.tolist()
    # of what a process that ends has made, some does not come
    assert seen == [0, 1, 2][: len(seen)] and (len(seen) == 3 or how is ends)
    return str(caught.value)


def left():
    """Processes that go on, but for the ranks that other tests use again."""
    ranks = [p for pool in T.run_workers.__globals__["_pools"].values() for p in pool.processes]
    found = [p for p in multiprocessing.active_children() if p not in ranks]
    for process in found:
        process.join(20)
    return [p for p in found if p.is_alive()]


def unsendable():
    raise Unsendable("a disk", "on fire")


def ends():
    os._exit(1)


@pytest.mark.parametrize(
    "how, said",
    [(unsendable, "sample 3: a disk on fire"), (ends, r"sample \d: its process did not send it")],
)
def test_what_a_process_cannot_read_raises_on_every_rank(how, said):
    other, mine = st.simulate(2, lambda: bad(how, workers=1))
    assert not left()
    assert other == f"another rank could not read its part of a sample: {mine}"
    assert re.match(said, mine), mine


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_that_does_not_come_raises_on_every_rank(workers, monkeypatch):
    # how long torch waits for a process to end
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    never = threading.Event()
    other, mine = st.simulate(2, lambda: bad(never.wait, workers=workers, timeout=1.0))
    never.set()
    assert not left()
    assert other == f"another rank could not read its part of a sample: {mine}"
    assert mine.startswith("sample 3: ")


def test_no_process_is_left():
    def run():
        loader = Loader(Numbers(100), mesh_of((1,)), workers=2)
        for _ in loader:
            break
        next(iter(loader))
        with pytest.raises(ZeroDivisionError):
            for _ in loader:
                1 / 0  # noqa: B018

    st.simulate(1, run)
    assert not left()


def test_time_that_is_over_on_one_rank_ends_all_at_one_batch():
    def run():
        mesh = mesh_of((1, 3))
        loader = Loader(Numbers(8), mesh, sampler=range(8), budget=1e6)
        first = []
        for i, batch in enumerate(loader):
            first += batch.tolist()
            if i == 2 and mesh.get_local_rank("domain") == 1:
                loader.budget = 0.0
        assert loader.over and list(loader) == []
        again = Loader(Numbers(8), mesh, sampler=range(8), budget=1e6)
        again.load_state_dict(loader.state_dict())
        second = [i for batch in again for i in batch.tolist()]
        assert not again.over
        return first, second

    assert st.simulate(3, run) == [([0, 1, 2], [3, 4, 5, 6, 7])] * 3


def test_what_makes_no_sense_is_refused():
    def run():
        mesh = mesh_of((1,))
        for options in ({"workers": -1}, {"timeout": 0}, {"timeout": 1, "prefetch": 0}):
            with pytest.raises(ValueError, match=next(iter(options))):
                Loader(Numbers(3), mesh, **options)

    st.simulate(1, run)


def test_the_end_waits_no_longer_for_a_sample_than_the_loop():
    begun, go_on = threading.Event(), threading.Event()

    def read_slowly(item):
        if item:
            begun.set()
            go_on.wait(20)
        return item

    source = InThread(read_slowly, [0, 1], 2, timeout=0.05)
    assert next(source) == 0 and begun.wait(20)
    # as where another rank's came too late
    source.close()
    waits = source.thread.is_alive()
    go_on.set()
    source.thread.join()
    assert waits


class Unsent(Numbers):
    def __getitem__(self, i):
        return (j for j in range(i)) if i == 3 else torch.ones(2, requires_grad=True)


def test_what_cannot_be_sent_raises_on_every_rank():
    """The thread of a process that sends would tell nobody."""

    def run():
        loader = Loader(Unsent(6), mesh_of((1, 2)), sampler=range(6), workers=1, timeout=60)
        seen = 0
        with pytest.raises(RuntimeError, match="sample 3: it cannot be sent by its process"):
            for batch in loader:
                seen += batch.requires_grad
        return seen

    assert st.simulate(2, run) == [3, 3]
    assert not left()

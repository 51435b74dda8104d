"""The loader: who gets which sample, when, and what happens where one cannot be read."""

import threading

import numpy as np
import pytest
import torch
from samples import Numbers, mesh_of
from torch.distributed.tensor import Shard
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
)

import shardtensor as st
from shardtensor import testing as T
from shardtensor.io import DomainSampler, Loader, open_array, read, read_block, spec_of

SAMPLES = np.random.default_rng(0).normal(size=(11, 6, 4)).astype(np.float32)


class Fields:
    """Reads one row of a file; sample `bad` cannot be read by domain rank 1."""

    def __init__(self, path, mesh, bad=None):
        self.path, self.mesh, self.bad = path, mesh, bad
        self.bytes_read = 0
        self.mine = mesh.get_coordinate()[-1]
        self.domain = mesh["domain"] if mesh.ndim > 1 else mesh

    def __len__(self):
        return len(SAMPLES)

    def __getitem__(self, i):
        if i == self.bad and self.mine == 1:
            raise OSError("disk on fire")
        sizes = {0: cut(self.domain)}
        x = read(self.path, self.domain, [Shard(0)], index={0: i}, sizes=sizes)
        self.bytes_read += x.to_local().numel() * 4
        return {"x": x, "number": i, "name": f"s{i}"}


def cut(domain):
    n = domain.size()
    return [6 - (n - 1)] + [1] * (n - 1)


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "samples.npy", SAMPLES)
    return str(tmp_path / "samples.npy")


def epoch(path, shape, prefetch):
    mesh = mesh_of(shape)
    dataset = Fields(path, mesh)
    loader = Loader(dataset, mesh, batch_size=2, prefetch=prefetch)
    found = [(b["number"].tolist(), b["name"], b["x"].full_tensor().numpy()) for b in loader]
    assert len(found) == len(loader)
    return found, loader.bytes_read, mesh.get_coordinate()


def check(results, shape):
    groups = {}
    rows = shape[-1]
    for found, nbytes, place in results:
        numbers = [n for batch, _, _ in found for n in batch]
        for batch, names, x in found:
            np.testing.assert_array_equal(x, SAMPLES[batch])
            assert names == [f"s{n}" for n in batch]
        groups.setdefault(place[0] if len(shape) > 1 else 0, []).append(numbers)
        mine = 1 if place[-1] else 6 - (rows - 1)
        # read ahead, but never more than the epoch
        assert nbytes == len(numbers) * mine * 4 * 4
    for same in groups.values():
        assert all(n == same[0] for n in same)
    everything = [n for same in groups.values() for n in same[0]]
    assert len(set(everything)) == len(everything) >= 8


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (4,), (2, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_groups_get_the_same_samples(path, shape, prefetch):
    check(st.simulate(int(np.prod(shape)), epoch, path, shape, prefetch), shape)


@pytest.mark.gloo
def test_groups_over_processes(path):
    check(T.run_workers(4, epoch, path, (2, 2), 2), (2, 2))


def orders(shape, **options):
    sampler = DomainSampler(11, mesh_of(shape), **options)
    first = list(sampler)
    sampler.set_epoch(1)
    assert len(first) == len(sampler)
    return first, list(sampler)


def ordered(shape, **options):
    return st.simulate(2, lambda: orders(shape, **options))


def test_sampler():
    for first, second in ordered((2, 1)):
        assert len(first) == 5 and first != second
    a, b = (f for f, _ in ordered((2, 1), drop_last=False))
    assert len(a) == len(b) == 6 and set(a) | set(b) == set(range(11))
    (plain, again), _ = ordered((1, 2), shuffle=False)
    assert plain == again == list(range(11))
    assert ordered((2, 1), seed=1) != ordered((2, 1), seed=2)

    def refused():
        with pytest.raises(ValueError, match="1 samples for 2 groups"):
            DomainSampler(1, mesh_of((2, 1)))

    st.simulate(2, refused)


def test_frameworks_leave_the_sampler_alone():
    """Lightning and Fabric deal samples to single ranks where the sampler is not a distributed one."""
    data_connector = pytest.importorskip("lightning.fabric.utilities.data")

    def run():
        loader = DataLoader(range(11), sampler=DomainSampler(11, mesh_of((2, 1))))
        assert isinstance(loader.sampler, DistributedSampler)
        data_connector._set_sampler_epoch(loader, 3)
        return loader.sampler.epoch

    assert st.simulate(2, run) == [3, 3]


def test_sampler_in_a_torch_loader():
    def run():
        sampler = DomainSampler(11, mesh_of((2, 1)))
        batches = list(DataLoader(torch.arange(11), batch_size=2, sampler=sampler))
        return torch.cat(batches).tolist(), list(sampler)

    for got, wanted in st.simulate(2, run):
        assert got == wanted


def resumed(path, stop):
    mesh = mesh_of((2,))

    def loader():
        return Loader(Fields(path, mesh), mesh, batch_size=2)

    whole, first = loader(), loader()
    straight = [b["number"].tolist() for _ in range(2) for b in whole]
    got = []
    for _ in range(2):
        for batch in first:
            got.append(batch["number"].tolist())
            if len(got) == stop:
                break
        if len(got) == stop:
            break
    second = loader()
    second.load_state_dict(first.state_dict())
    while len(got) < len(straight):
        got += [b["number"].tolist() for b in second]
    return straight, got


@pytest.mark.parametrize("stop", [1, 3, 5, 6, 9])
def test_resumes_with_the_next_batch(path, stop):
    for straight, got in st.simulate(2, resumed, path, stop):
        assert got == straight and len(straight) == 10
        assert straight[:5] != straight[5:]


def burning(path, prefetch):
    mesh = mesh_of((2,))
    loader = Loader(Fields(path, mesh, bad=7), mesh, prefetch=prefetch)
    seen = []
    with pytest.raises(RuntimeError) as caught:
        for batch in loader:
            seen.append(batch["number"].tolist())
    return seen, str(caught.value)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_raises_on_every_rank(path, prefetch):
    (a, first), (b, second) = st.simulate(2, burning, path, prefetch)
    assert a == b and [7] not in a
    assert first == f"another rank could not read its part of a sample: {second}"
    assert second == "sample 7: disk on fire"


class Told(Numbers):
    """Says which samples were read."""

    def __init__(self, n):
        super().__init__(n)
        self.read = [threading.Event() for _ in range(n)]

    def __getitem__(self, i):
        self.read[i].set()
        return i


def test_reads_ahead():
    """While one batch is computed the next two are read, and none is without prefetch."""

    def run(prefetch, limit):
        data, mesh = Told(6), mesh_of((1,))
        loader, ahead = Loader(data, mesh, prefetch=prefetch, sampler=range(6)), []
        for i, _ in enumerate(loader):
            ahead.append([event.wait(limit) for event in data.read[i + 1 : i + 3]])
        assert loader.waited > 0
        return ahead

    assert st.simulate(1, run, 2, 60.0) == [[[True] * 2] * 4 + [[True], []]]
    assert st.simulate(1, run, 0, 0.0) == [[[False] * 2] * 4 + [[False], []]]


def test_progress_and_leaving_early(path, capsys):
    def run():
        mesh = mesh_of((1,))
        loader = Loader(Fields(path, mesh), mesh, progress=True)
        for i, _ in enumerate(loader):
            if i == 3:
                break
        return loader.done

    assert st.simulate(1, run) == [4]
    assert "epoch 0" in capsys.readouterr().out


# ends ---------------------------------------------------------------------------------------------


class Ending(Numbers):
    def __getitem__(self, i):
        raise SystemExit


def test_what_ends_a_thread_raises():
    def run():
        with pytest.raises(RuntimeError, match=r"sample \d+: SystemExit"):
            list(Loader(Ending(4), mesh_of((1,))))

    st.simulate(1, run)


def test_no_thread_is_left():
    def run():
        before = threading.active_count()
        loader = Loader(Numbers(100), mesh_of((1,)))
        for _ in loader:
            break
        with pytest.raises(ZeroDivisionError):
            for _ in loader:
                1 / 0  # noqa: B018
        next(iter(loader))
        return threading.active_count() - before

    assert st.simulate(1, run) == [0]


# torch's own loader -------------------------------------------------------------------------------


def in_workers(path, whole):
    mesh = mesh_of((1,))
    source = open_array(path)
    spec = spec_of(source, mesh, [Shard(0)], {0: 0})

    class Lazy(Numbers):
        def __getitem__(self, i):
            if whole:
                return read(source, mesh, [Shard(0)], index={0: i})
            return read_block(source, spec, index={0: i})

    return torch.cat(list(DataLoader(Lazy(4), num_workers=2)))


def test_workers_give_blocks(path):
    assert torch.equal(st.simulate(1, in_workers, path, False)[0], torch.from_numpy(SAMPLES[:4]))
    with pytest.raises(st.RankError, match=r"in a worker of torch's DataLoader.*io.Loader"):
        st.simulate(1, in_workers, path, True)

"""The loader: who gets which sample, when, and what happens where one cannot be read."""

import threading
import time
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

import shardtensor as st
from shardtensor import testing as T
from shardtensor.io import DomainSampler, Loader, open_array, read, read_block, spec_of
from shardtensor.io.collate import collate, moved

SAMPLES = np.random.default_rng(0).normal(size=(11, 6, 4)).astype(np.float32)


class Fields:
    """Reads one row of a file; sample `bad` cannot be read by domain rank 1."""

    def __init__(self, path, mesh, bad=None, sleep=0.0):
        self.path, self.mesh, self.bad, self.sleep = path, mesh, bad, sleep
        self.bytes_read = 0
        self.mine = mesh.get_coordinate()[-1]
        self.domain = mesh["domain"] if mesh.ndim > 1 else mesh

    def __len__(self):
        return len(SAMPLES)

    def __getitem__(self, i):
        time.sleep(self.sleep)
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


def mesh_of(shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "domain")[-len(shape) :])


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
    assert first == "another rank could not read its part of a sample"
    assert second == "sample 7: disk on fire"


def test_reads_ahead(path):
    """Reading and computing take 20 ms each: together 20, not 40."""

    def run(prefetch):
        mesh = mesh_of((1,))
        loader = Loader(Fields(path, mesh, sleep=0.02), mesh, prefetch=prefetch)
        begin = time.perf_counter()
        for _ in loader:
            time.sleep(0.02)
        return time.perf_counter() - begin, loader.waited

    (alone, waited), (ahead, less) = (st.simulate(1, run, p)[0] for p in (0, 2))
    assert ahead < 0.8 * alone
    assert less < 0.6 * waited


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


def test_collate():
    two = [{"a": torch.ones(2), "b": (1.5, "x")}, {"a": torch.zeros(3), "b": (2.5, "y")}]
    found = collate(two)
    assert [t.shape for t in found["a"]] == [(2,), (3,)]
    assert found["b"][0].tolist() == [1.5, 2.5] and found["b"][1] == ["x", "y"]

    def run():
        mesh = T.make_mesh((2,))
        made = [
            st.distribute_tensor(torch.full((n,), float(n)), mesh, [Shard(0)]) for n in (3, 3, 4)
        ]
        with st.trace() as t:
            batch, kept = collate(made[:2]), collate(made[1:])
        assert not t.sent and isinstance(kept, list)
        return batch.full_tensor()

    assert torch.equal(st.simulate(2, run)[0], torch.full((2, 3), 3.0))


# small datasets, other samplers -------------------------------------------------------------------


class Numbers:
    """Numbers, which nothing has to be read for."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return i


def epochs(n, shape, batch_size, **options):
    mesh = mesh_of(shape)
    if options:
        options = {"sampler": DomainSampler(n, mesh, **options)}
    loader = Loader(Numbers(n), mesh, batch_size=batch_size, **options)
    found = [b.tolist() for b in loader]
    assert len(found) == len(loader)
    return found


@pytest.mark.parametrize("n, shape, sizes", [(3, (1, 1), [3]), (5, (2, 1), [3]), (1, (3, 1), [1])])
def test_a_dataset_smaller_than_a_round(n, shape, sizes):
    ranks = st.simulate(shape[0], epochs, n, shape, 4)
    assert all([len(b) for b in found] == sizes for found in ranks)
    assert {i for found in ranks for b in found for i in b} == set(range(n))


def test_the_last_batch():
    def run(drop_last):
        return st.simulate(2, lambda: epochs(11, (2, 1), 4, drop_last=drop_last))

    keep, drop = run(False), run(True)
    assert [[len(b) for b in found] for found in keep] == [[4, 2]] * 2
    assert {i for found in keep for b in found for i in b} == set(range(11))
    assert [[len(b) for b in found] for found in drop] == [[4]] * 2

    def refused():
        with pytest.raises(ValueError, match="5 samples of a domain group make no batch of 6"):
            epochs(11, (2, 1), 6, drop_last=True)

    st.simulate(2, refused)


def test_rounds_are_the_same_for_any_number_of_groups():
    rounds = []
    for groups in (1, 2, 4):
        ranks = st.simulate(groups, epochs, 24, (groups, 1), 4 // groups)
        rounds.append([sorted(chain(*parts)) for parts in zip(*ranks, strict=True)])
    assert rounds[0] == rounds[1] == rounds[2] and len(rounds[0]) == 6


def with_sampler(make, shape):
    mesh = mesh_of(shape)
    rank = mesh.get_coordinate()[0] * shape[1] + mesh.get_coordinate()[1]
    try:
        return [b.tolist() for b in Loader(Numbers(8), mesh, batch_size=2, sampler=make(rank))]
    except ValueError as e:
        return str(e)


def test_samplers_that_part_the_ranks_of_a_sample():
    def distributed(rank):
        return DistributedSampler(range(8), num_replicas=2, rank=rank, shuffle=False)

    def shuffled(rank):
        return RandomSampler(range(8), generator=torch.Generator().manual_seed(rank))

    def longer(rank):
        return SequentialSampler(range(4 + 4 * rank))

    for make, kind in [(distributed, "DistributedSampler"), (shuffled, "RandomSampler")]:
        told = st.simulate(2, with_sampler, make, (1, 2))
        assert told[0] == told[1] and "ranks 0 and 1 hold parts of one sample" in told[0]
        assert kind in told[0] and "io.DomainSampler" in told[0]
    # of ranks of their own each may read what it likes, but as often as the others
    assert st.simulate(2, with_sampler, distributed, (2, 1)) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    told = st.simulate(2, with_sampler, longer, (2, 1))
    assert told[0] == told[1] and "2 batches from 0, 4 batches from 0" in told[0]
    same = st.simulate(2, with_sampler, lambda rank: SequentialSampler(range(8)), (1, 2))
    assert same == [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2


def test_resumes_on_other_numbers_of_groups():
    def start(shape, batch_size, state=None, **options):
        mesh = mesh_of(shape)
        loader = Loader(
            Numbers(24), mesh, batch_size=batch_size, sampler=DomainSampler(24, mesh, **options)
        )
        if state is not None:
            loader.load_state_dict(state)
            return [b.tolist() for b in loader]
        for i, _ in enumerate(loader):
            if i == 2:
                return loader.state_dict()

    state = st.simulate(2, start, (2, 1), 2)[0]  # 12 samples
    straight = st.simulate(1, start, (1, 1), 4, {"epoch": 0, "done": 0})[0]
    assert st.simulate(1, start, (1, 1), 4, state)[0] == straight[3:]
    parts = st.simulate(3, start, (3, 1), 2, state)
    assert sorted(chain(*chain(*parts))) == sorted(chain(*straight[3:]))

    def refused():
        with pytest.raises(ValueError, match="resume after 12 samples of an epoch, 5 a round"):
            start((1, 1), 5, state)
        with pytest.raises(ValueError, match="resume: seed was 0, this sampler has 1"):
            start((1, 1), 4, state, seed=1)

    st.simulate(1, refused)


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


# structures ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: int
    b: str


@dataclass(frozen=True)
class Sample:
    x: np.ndarray
    weight: float = field(init=False, default=0.5)

    def __post_init__(self):
        assert isinstance(self.x, np.ndarray)


def test_batches_are_those_of_torch():
    samples = [
        {
            "pair": Pair(i, f"n{i}"),
            "array": np.arange(3, dtype=np.float32) + i,
            "big": np.arange(2, dtype=">i4"),
            "scalar": np.float64(i),
            "float": 1.6e9 + i / 4,
            "flag": bool(i),
            "list": [i, torch.tensor(i)],
        }
        for i in range(2)
    ]
    found = collate(samples)
    for s in samples:
        s["big"] = s["big"].astype("i4")
    wanted = default_collate(samples)
    assert type(found["pair"]) is Pair and found["pair"].b == ["n0", "n1"]
    for key in ("array", "big", "scalar", "float", "flag"):
        assert found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]), key
    assert torch.equal(found["pair"].a, wanted["pair"][0])
    assert all(torch.equal(a, b) for a, b in zip(found["list"], wanted["list"], strict=True))
    batch = moved(collate([Sample(np.ones(2)), Sample(np.zeros(2))]), torch.device("cpu"))
    assert type(batch) is Sample and batch.x.shape == (2, 2) and batch.weight.tolist() == [0.5, 0.5]
    assert collate([None, None]) == [None, None] and collate([np.array("a")] * 2)[1] == "a"
    with pytest.raises(ValueError, match=r"differ in structure: dict of \['a'\], dict of \['b'\]"):
        collate([{"a": 1}, {"b": 1}])


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

"""`tiled` with a GPU's pager: on a CPU whose copies run as late as their events allow."""

import copy
import errno
import gc
import pickle

import pytest
import torch
from late_streams import LateStreams
from models import ViT
from test_tiled import CASES, runs, same
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.paged import files, pager, pinned, tiled
from shardtensor.paged.pinned import Pinned, Pool, pieces


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    """Nearly everything is paged, by copies of a stream that is late."""
    made = []

    def shelf(device, folder, memory):
        made.append(LateStreams())
        return Pinned(made[-1], folder, None if folder is None else memory)

    monkeypatch.setattr(pager, "LEAST", 512)
    monkeypatch.setattr(pinned, "_LEAST", 64)
    monkeypatch.setattr(tiled, "shelf", shelf)
    return made


def convolutions():
    """A norm, whose ranks meet, in-place ops, what backward reads twice."""
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(4, 4, 3, padding=1, stride=2), nn.GELU(), nn.Upsample(scale_factor=2)]
    return nn.Sequential(*layers, nn.Conv2d(4, 1, 1))


MODELS = {
    "convolutions": (convolutions, (1, 2, 24, 16), (2, 2), (2, 3)),
    "vit": (lambda: ViT((8, 16), 4, 2, 1, width=8, depth=1), (1, 2, 8, 16), (2,), (2,)),
    "spectral": CASES["spectral"],
}


@pytest.mark.parametrize("spill", ["cpu", "folder"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_plain_model(name, spill, streams, tmp_path):
    make, shape, parts, dim = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    twin = copy.deepcopy(model)
    run = st.tiled(twin, parts, dim, memory=2**12, spill="cpu" if spill == "cpu" else tmp_path)
    same(runs(twin, x, run), runs(model, x, model))
    assert run.paging.returned > 2**12
    # the host waits for what it writes to files alone
    assert (streams[0].host_waits > 0) == (spill == "folder")
    assert not list(tmp_path.iterdir())


def test_a_warm_step_pins_nothing(streams):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(*[nn.Conv1d(4, 4, 3, padding=1) for _ in range(4)]),
        torch.randn(1, 4, 512),
    )
    run = st.tiled(model, 4, 2, memory=2**12, spill="cpu")
    found = []
    for _ in range(3):
        run(x).square().sum().backward()
        found.append(streams[0].pinned_bytes)
        assert run._shelves[x.device].pool.used == 0
    assert found[0] == found[2] >= run.paging.most > 0


def test_a_dropped_output_and_a_full_disk_leave_pinned_memory(streams, tmp_path, monkeypatch):
    model = nn.Sequential(*[nn.Conv1d(4, 4, 3, padding=1) for _ in range(4)])
    run, x = st.tiled(model, 4, 2, memory=2**12, spill=tmp_path), torch.randn(1, 4, 512)
    y = run(x)
    (shelf,) = run._shelves.values()
    assert shelf.pool.used > 0
    del y
    gc.collect()
    assert shelf.pool.used == 0

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(files.os, "posix_fallocate", full)
        with pytest.raises(st.RankError, match="No space left"):
            run(x)
    assert shelf.pool.used == 0
    torch.testing.assert_close(run(x), model(x))


def test_what_a_step_returns_is_in_memory(streams):
    kept = []

    def step(model, mesh):
        rows = torch.arange(4096.0) + mesh.get_rank()
        kept.append(rows)
        x = st.ShardTensor.from_local(torch.ones(1, 1, 64, 64), mesh, [Shard(2)])
        for _ in range(3):
            model(x)
        return rows * 2

    model = nn.Conv2d(1, 1, 3, padding=1)
    run = st.tiled(model, 3, 2, memory=2**13, spill="cpu")
    with torch.no_grad():
        assert torch.equal(run.run(step), torch.arange(4096.0) * 2)
    assert run.paging.spilled > 0
    for rank, rows in enumerate(kept):
        assert torch.equal(rows, torch.arange(4096.0) + rank)


def shelved(budget=4096, folder=None, bound=None):
    shelf = Pinned(LateStreams(), folder, bound)
    return shelf, pager.Pager(budget, shelf)


def test_copies_begin_before_room_is_needed():
    """A quarter of the budget is copied by the time that an op needs it."""
    shelf, pages = shelved()
    with pager.Paged(pages):
        kept = [torch.full((128,), float(i), dtype=torch.float64) for i in range(4)]
        # a KiB each: the first is copied, none has gone
        assert len(pages.clean) == 1 and not pages.gone
        assert shelf.streams.done == 0
        more = kept[-1] + 1
        assert len(pages.gone) == 1 and shelf.streams.done == 1
        assert pages.resident <= 4096
        assert all(bool((x == i).all()) for i, x in enumerate([*kept, more]))


def test_room_is_made_beside_what_is_copied_and_read():
    """One that comes back, read with the only one that could go at once."""
    _, pages = shelved()
    with pager.Paged(pages):
        kept = [torch.full((128,), float(i), dtype=torch.float64) for i in range(4)]
        kept.append(kept[-1] + 1)
        first, second = (x.untyped_storage()._cdata for x in kept[:2])
        assert [*pages.gone] == [first] and [*pages.clean] == [second]
        assert bool((kept[0] + kept[1] == 1).all())
    assert pages.done.peak <= 4096


def test_what_is_only_read_is_copied_once_and_what_is_written_again():
    _, pages = shelved()
    with pager.Paged(pages):
        x = torch.zeros(256, dtype=torch.float64)
        for _ in range(2):
            pages.room(4096)
            assert pages.done.spilled == 2048 and len(pages.gone) == 1
            assert float(x.sum()) == 0
        x.add_(1)
        pages.room(4096)
        assert pages.done.spilled == 4096
        assert float(x.sum()) == 256


def test_what_ends_while_it_comes_back_keeps_its_memory():
    """Until the copy has ended; to others it would be given at once."""
    shelf, pages = shelved()
    with pager.Paged(pages):
        x = torch.zeros(128, dtype=torch.float64)
        pages._let_go(x.untyped_storage()._cdata)
        pages.resume(None)
        assert pages.coming == 1024
        del x
        gc.collect()
        assert shelf.streams.queue
    pages.close()
    assert not shelf.streams.queue and shelf.pool.used == 0


def test_several_streams_wait_for_a_copy(tmp_path):
    """Memory is given up when all of them do, and read by each when it does."""
    shelf, pages = shelved()
    waits, wait = [], shelf.streams.wait
    shelf.streams.wait = lambda stream, event: (waits.append(stream), wait(stream, event))
    with pager.Paged(pages):
        x = torch.ones(128, dtype=torch.float64)
        for name in ("one", "two"):
            shelf.streams.computing = name
            x + 1
        waits.clear()
        pages.room(4096)
        assert set(waits) >= {"one", "two"}
        assert float(x.sum()) == 128


def test_pieces_hold_the_bytes_and_little_more():
    for n in [1, 64, 65, 1000, 4096, 4097, 66 * 2**16, 3 * 2**20 + 5]:
        found = pieces(n)
        assert len(found) <= 3 and all(p & (p - 1) == 0 for p in found)
        assert n <= sum(found) <= max(64 + n, n * 5 / 4)


def test_the_pool_keeps_as_much_as_was_in_use():
    streams = LateStreams()
    pool = Pool(streams, None)
    for size in [2**10, 2**11, 2**12, 2**13]:
        pool.give(pool.take(size))
        assert pool.used == 0 and pool.kept <= 2 * pool.most
    pinned_so_far = streams.pinned_bytes
    pool.give(pool.take(2**13))
    assert streams.pinned_bytes == pinned_so_far
    bounded = Pool(streams, 2**12)
    taken = bounded.take(2**11)
    assert bounded.fits(2**11) and not bounded.fits(2**12)
    bounded.give(taken)
    bounded.take(2**12)
    assert bounded.kept == 0


def test_a_folder_gets_what_pinned_memory_cannot_hold(tmp_path):
    shelf, pages = shelved(4096, tmp_path, 4096)
    with pager.Paged(pages):
        kept = [torch.full((128,), float(i), dtype=torch.float64) for i in range(16)]
        assert shelf.pool.used <= 4096 and shelf.streams.host_waits > 0
        assert all(bool((x == i).all()) for i, x in enumerate(kept))
        assert shelf.pool.used <= 4096
    pages.close()
    assert all(bool((x == i).all()) for i, x in enumerate(kept))
    assert not list(tmp_path.iterdir())


def test_a_copy_of_a_tiled_model_has_its_own_memory(streams):
    run = st.tiled(nn.Conv1d(1, 1, 3), 2, 2, memory=2**12, spill="cpu")
    run(torch.randn(1, 1, 64))
    for again in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        (shelf,) = again._shelves.values()
        assert shelf is not next(iter(run._shelves.values()))
        assert again(torch.randn(1, 1, 64)).shape == (1, 1, 62)

"""Zarr arrays that are there already: their shards, what xarray made of them, and deaths among writes."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Program
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import io
from shardtensor import testing as T
from shardtensor.io import staged, write

zarr = pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")

VALUES = torch.arange(11 * 7, dtype=torch.float32).reshape(11, 7) + 1


def put(url, mesh, placements, sizes=None, values=VALUES, name="t", **options):
    x = st.distribute_tensor(values, T.make_mesh(mesh), placements, sizes=sizes)
    io.write_zarr(x, url, name, **options)


def made(tmp_path, version=3, shape=tuple(VALUES.shape), **options):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=version)
    group.create_array("t", shape=shape, dtype="f4", **options)
    return str(tmp_path / "a.zarr")


def found(url, name="t"):
    return zarr.open_group(url, mode="r")[name][...]


@pytest.mark.parametrize(
    "mesh, placements, sizes",
    [
        ((2,), [Shard(0)], {0: (5, 6)}),
        ((3,), [Shard(0)], {0: (1, 10, 0)}),
        ((4,), [Shard(0)], None),
        ((2, 2), [Shard(0), Shard(1)], {0: (3, 8), 1: (6, 1)}),
        ((2, 2), [Shard(0), Shard(0)], None),
        ((2, 2), [Replicate(), Shard(1)], None),
    ],
)
@pytest.mark.parametrize("chunks, shards", [((2, 3), (4, 6)), ((1, 7), (8, 7)), ((3, 2), None)])
def test_ranks_write_whole_shards(tmp_path, mesh, placements, sizes, chunks, shards):
    url = made(tmp_path, chunks=chunks, shards=shards)
    st.simulate(int(np.prod(mesh)), put, url, mesh, placements, sizes)
    np.testing.assert_array_equal(found(url), VALUES)


@pytest.mark.parametrize(
    "version, chunks, shards", [(2, (4,), None), (3, (4,), None), (3, (2,), (4,))]
)
def test_steps_that_share_chunks(tmp_path, version, chunks, shards):
    """A chunk or a shard that holds four steps keeps the others."""
    shards = shards and (*shards, 6, 7)
    url = made(tmp_path, version, (0, 11, 7), chunks=(*chunks, 3, 7), shards=shards)
    for step in (0, 5, 1, 2, 0):
        values = VALUES + 100 * step
        st.simulate(2, lambda v=values, s=step: put(url, (2,), [Shard(0)], {0: (5, 6)}, v, step=s))
    wanted = torch.stack([VALUES + 100 * s if s in (0, 1, 2, 5) else 0 * VALUES for s in range(6)])
    np.testing.assert_array_equal(found(url), wanted)


def test_a_store_of_xarray_grows(tmp_path):
    """Its metadata are consolidated: xarray sees the new row all the same."""
    for version in (2, 3):
        url = str(tmp_path / f"{version}.zarr")
        old = xr.Dataset({"t": (("time", "y", "x"), VALUES[None].numpy())})
        old.to_zarr(url, zarr_format=version, consolidated=True)
        st.simulate(2, lambda url: put(url, (2,), [Shard(0)], values=VALUES * 2, step=1), url)
        data = xr.open_zarr(url, consolidated=True)["t"]
        assert data.dims == ("time", "y", "x")
        np.testing.assert_array_equal(data.values, torch.stack([VALUES, VALUES * 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_zeros_are_not_missing(tmp_path, dtype):
    """xarray takes the fill value of a Zarr 2 array for a mask."""
    url, values = str(tmp_path / "a.zarr"), (VALUES % 2).to(dtype)
    options = dict(values=values, dims=("y", "x"), zarr_format=2)
    st.simulate(1, lambda: put(url, (1,), [Shard(0)], **options))
    data = xr.open_zarr(url, consolidated=False)["t"].values
    assert data.dtype == values.numpy().dtype
    np.testing.assert_array_equal(data, values)


def test_refused(tmp_path):
    def run():
        x = st.distribute_tensor(VALUES, T.make_mesh((2,)), [Shard(0)])
        with pytest.raises(TypeError, match="write_zarr of a Tensor, which has no mesh"):
            io.write_zarr(VALUES, tmp_path / "a.zarr", "t")
        for name, step in [("../t", None), ("", None), ("a//b", None), ("t", -1)]:
            with pytest.raises(ValueError, match=f"name '{name}', step {step}; a name stays"):
                io.write_zarr(x, tmp_path / "a.zarr", name, step=step)
        io.write_zarr(x, tmp_path / "a.zarr", "deep/er/t")

    st.simulate(2, run)
    assert not (tmp_path / "t").exists()
    np.testing.assert_array_equal(found(str(tmp_path / "a.zarr"), "deep/er/t"), VALUES)


# deaths ---------------------------------------------------------------------------------------------

DEATH = """
import os, sys, torch
import shardtensor as st
from shardtensor import io, testing as T
from shardtensor.io import write
from torch.distributed.tensor import Shard

url, step = sys.argv[1], eval(sys.argv[2])
numbers, calls = write._numbers, []

def dying(local):
    calls.append(local.numel())
    # the first rank asks for the dtype, one rank writes, the other dies
    if sum(map(bool, calls)) == 2:
        os._exit(9)
    return numbers(local)

def run():
    x = st.distribute_tensor(torch.full((11, 7), -1.0), T.make_mesh((2,)), [Shard(0)])
    io.write_zarr(x, url, "t", step=step, chunks=(3, 7), zarr_format=int(sys.argv[3]))

write._numbers = dying
st.simulate(2, run)
"""


@pytest.mark.parametrize("version, step", [(2, 1), (3, 0), (3, None)])
def test_a_death_while_writing(tmp_path, version, step):
    """The data of before stay, and the next write is as any other."""
    url = str(tmp_path / "a.zarr")
    options = dict(chunks=(3, 7), zarr_format=version)

    def store(values, step):
        st.simulate(2, lambda: put(url, (2,), [Shard(0)], None, values, step=step, **options))

    store(VALUES, None if step is None else 0)
    before = found(url)
    script = tmp_path.with_suffix(".py")
    script.write_text(DEATH)
    code, text = Program(script, url, step, version).ended()
    assert code == 9, text
    np.testing.assert_array_equal(found(url), before)
    store(VALUES * 3, step)
    np.testing.assert_array_equal(found(url) if step is None else found(url)[step], VALUES * 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr"]


def test_an_error_while_writing(tmp_path, monkeypatch):
    url, numbers, turn = str(tmp_path / "a.zarr"), write._numbers, threading.Lock()
    st.simulate(2, put, url, (2,), [Shard(0)])

    def failing(local):
        with turn:
            if local.numel() == 5 * 7:  # the second rank's
                raise OSError("disk full")
        return numbers(local)

    monkeypatch.setattr(write, "_numbers", failing)

    def run(values):
        with pytest.raises((OSError, RuntimeError), match=r"disk full|written by another rank"):
            put(url, (2,), [Shard(0)], None, values)

    st.simulate(2, run, VALUES * 2)
    np.testing.assert_array_equal(found(url), VALUES)


def test_a_death_among_the_moves(tmp_path, monkeypatch):
    """What was committed is completed by the next write."""
    url, moves, replace = str(tmp_path / "a.zarr"), [], staged._replace

    def store(step, values):
        put(url, (2,), [Shard(0)], None, values, step=step, chunks=(2, 7))

    st.simulate(2, store, 0, VALUES)

    def dying(source: Path, target: Path):
        moves.append(target)
        if len(moves) == 3:
            raise OSError("gone")
        replace(source, target)

    def run():
        with pytest.raises((OSError, RuntimeError), match=r"gone|completed by the first rank"):
            store(0, VALUES * 2)

    monkeypatch.setattr(staged, "_replace", dying)
    st.simulate(2, run)
    half = found(url)[0]
    assert (half == VALUES.numpy()).any() and (half == 2 * VALUES.numpy()).any()
    monkeypatch.setattr(staged, "_replace", replace)
    st.simulate(2, store, 1, VALUES * 3)
    np.testing.assert_array_equal(found(url), torch.stack([VALUES * 2, VALUES * 3]))


def test_an_array_has_one_writer_at_a_time(tmp_path):
    """As two groups of ranks beside a data axis would be: raised, with what to do, on all ranks."""
    url = str(tmp_path / "a.zarr")

    def write():
        x = st.distribute_tensor(torch.arange(6.0), T.make_mesh((2,)), [Shard(0)])
        io.write_zarr(x, url, "t")

    def refused():
        with pytest.raises((ValueError, RuntimeError)) as raised:
            write()
        return str(raised.value)

    st.simulate(2, write)
    with staged.alone(staged.place(url, "t")):
        first, second = st.simulate(2, refused)
        st.simulate(
            2,
            lambda: io.write_zarr(
                st.distribute_tensor(torch.ones(4), T.make_mesh((2,)), [Shard(0)]), url, "other"
            ),
        )
    assert "let one group write, or give each its own store" in first and "a.zarr.t" in first
    assert "could not be made by the first rank" in second
    st.simulate(2, write)
    assert zarr.open_group(url, mode="r")["t"][:].tolist() == [0, 1, 2, 3, 4, 5]
    assert {p.name for p in tmp_path.iterdir()} == {"a.zarr"}


BESIDE = """
import sys, time, torch, zarr
from pathlib import Path
import shardtensor as st
from shardtensor import io, testing as T
from shardtensor.io import target
from torch.distributed.tensor import Shard

url, name, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
listed, ended = Path(url + ".listed"), Path(url + ".ended")
consolidate = target.consolidate

def slowly(zarr, url):
    # what is found now is written when the other has ended; one that waits its turn does not
    consolidate(zarr, url)
    found = (Path(url) / "zarr.json").read_text()
    listed.touch()
    until = time.monotonic() + 0.5
    while not ended.exists() and time.monotonic() < until:
        time.sleep(0.01)
    (Path(url) / "zarr.json").write_text(found)

def run():
    x = st.distribute_tensor(torch.full((4,), step + 1.0), T.make_mesh((1,)), [Shard(0)])
    io.write_zarr(x, url, name, step=step, dims=("time", "x"), coords={"time": 6 * step})

if name == "slow":
    target.consolidate = slowly
else:
    while not listed.exists():
        time.sleep(0.01)
st.simulate(1, run)
if name == "fast":
    ended.touch()
"""


def test_writers_of_two_arrays_share_a_store(tmp_path):
    """As two groups of ranks beside a data axis: neither's metadata are lost, nor coordinates."""
    url, script = str(tmp_path / "a.zarr"), tmp_path / "job.py"
    script.write_text(BESIDE)
    both = [Program(script, url, "slow", 0), Program(script, url, "fast", 1)]
    for program in both:
        code, text = program.ended()
        assert code == 0, text
    data = zarr.open_group(url, mode="r", use_consolidated=True)
    assert data["time"][:].tolist() == [0, 6]
    assert data["slow"][0].tolist() == [1] * 4 and data["fast"][1].tolist() == [2] * 4
    assert not list(tmp_path.glob(".*"))


def test_a_store_has_one_lock_from_wherever_it_is_named(tmp_path, monkeypatch):
    store = tmp_path / "a.zarr"
    store.mkdir()
    monkeypatch.chdir(store)
    for url in (".", str(store), f"file://{store}"):
        with staged.in_turn(url, staged.place(url, "t")):
            assert [p.name for p in tmp_path.glob(".*")] == [".a.zarr.lock"]

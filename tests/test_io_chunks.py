"""What is said of chunks of which ranks read far more than they want, and what is advised."""

import threading
import warnings

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import io
from shardtensor import testing as T
from shardtensor.io import chunks

zarr = pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")


@pytest.fixture(autouse=True)
def small_arrays_count(monkeypatch):
    monkeypatch.setattr(chunks, "SMALL", 0)
    monkeypatch.setattr(chunks, "_warned", set())


def told(n, fn):
    """What each rank is warned of, one after the other: warnings are caught for the process."""
    turn = threading.Lock()

    def alone():
        with turn, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fn()
        return [str(w.message) for w in caught], [w.filename for w in caught]

    return st.simulate(n, alone)


def store(path, cut, shape=(81, 12, 16)):
    values = np.arange(np.prod(shape), dtype="f4").reshape(shape)
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    axes = {"time": np.arange(shape[0]), "latitude": np.linspace(60, -60, shape[1])}
    for name, v in {**axes, "longitude": np.arange(shape[2]) * 2.0}.items():
        group.create_array(name, data=v, dimension_names=[name])
    group["time"].attrs["units"] = "hours since 2000-01-01"
    made = group.create_array(
        "t", shape=shape, dtype="f4", chunks=cut, dimension_names=[*axes, "longitude"]
    )
    made[:] = values
    return str(path)


def test_steps_of_chunks_of_all_times(tmp_path):
    """81 times what is wanted, by chunks over time: said by LatLon, too, and no cut is advised."""
    url = store(tmp_path / "a.zarr", (81, 6, 16))

    def run():
        data = io.LatLon(url, ["t"], T.make_mesh((2,)), [Shard(1)])
        data[0], data[1]

    first, second = told(2, run)
    assert len(first[0]) == 1 and not second[0]
    (text,) = first[0]
    assert "81.0 times as many: 1 of 81 rows in its dim 0)" in text and "Cut where" not in text
    assert text.endswith("Store chunks of at most (1, 6, 16)")
    assert first[1] == [__file__]


def test_the_first_rank_tells_of_all(tmp_path):
    """Of the second one's, too; processes do not share what was said."""
    url = store(tmp_path / "f.zarr", (1, 6, 16))

    def run():
        chunks._warned.clear()
        io.read(
            io.open_array(url, "t"), T.make_mesh((2,)), [Shard(0)], index={0: 3}, sizes={0: (9, 3)}
        )

    first, second = told(2, run)
    assert "2.0 times as many: 3 of 6 rows in its dim 1" in first[0][0] and not second[0]


def test_cuts_that_leave_ranks_uneven_are_not_advised(tmp_path):
    """12 rows in chunks of 8 for 3 ranks: shards of 8, 4 and 0 rows would end where chunks do."""
    url = store(tmp_path / "b.zarr", (1, 8, 16))

    def run(sizes=None):
        mesh = T.make_mesh((3,))
        return io.LatLon(url, ["t"], mesh, [Shard(1)], sizes=sizes)[0]

    (text,) = told(3, run)[0][0]
    assert "2.0 times as many: 4 of 8 rows in its dim 1" in text and "(sizes=" not in text
    assert (
        "leave ranks uneven, (0, 8, 4) of the sample's dim 1: store chunks of at most (1, 4, 16)"
        in text
    )


def test_cuts_that_keep_ranks_even_are_right(tmp_path):
    """What is advised is taken: no warning is left."""
    url = store(tmp_path / "c.zarr", (1, 3, 16))
    sizes = {}

    def run():
        source = io.open_array(url, "t")
        source.name += str(len(sizes))
        io.read(source, T.make_mesh((2,)), [Shard(0)], index={0: 3}, sizes=sizes or {0: (5, 7)})

    texts = [t for found, _ in told(2, run) for t in found]
    assert texts == [] or "{0: (6, 6)}" in texts[0]
    spoiled = store(tmp_path / "d.zarr", (1, 6, 16))

    def worse():
        source = io.open_array(spoiled, "t")
        io.read(source, T.make_mesh((2,)), [Shard(0)], index={0: 3}, sizes={0: (7, 5)})

    texts = [t for found, _ in told(2, worse) for t in found]
    assert len(texts) == 1 and "(sizes={0: (6, 6)}, see io.aligned_sizes)" in texts[0]
    sizes[0] = (6, 6)
    assert all(not found for found, _ in told(2, run))


def test_chunks_of_the_well(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.hdf5"
    u = torch.arange(2.0 * 8 * 6 * 4).reshape(2, 8, 6, 4)
    io.write_well(path, {"u": u}, name="some", times=range(8))
    with h5py.File(path, "r+") as file:
        attrs = dict(file["t0_fields/u"].attrs)
        del file["t0_fields/u"]
        data = file["t0_fields"].create_dataset("u", data=u.numpy(), chunks=(1, 8, 3, 4))
        data.attrs.update(attrs)

    def run():
        with io.WellFile(path) as file:
            io.read_sharded(file, ["u"], [(1, 3)], T.make_mesh((2,)), [Shard(2)])

    first, second = told(2, run)
    assert len(first[0]) == 1 and not second[0]
    assert "8.0 times as many: 1 of 8 rows in its dim 1" in first[0][0]


def test_variables_alike_are_told_of_once_and_small_ones_never(tmp_path, monkeypatch):
    """A store of eight variables and its coordinates is one warning, not ten."""
    url = store(tmp_path / "e.zarr", (1, 12, 16))
    group = zarr.open_group(url, mode="r+")
    for i in range(7):
        group.create_array(f"t{i}", data=group["t"][:], chunks=(1, 12, 16))

    def run():
        mesh = T.make_mesh((2,))
        for name in ("t", *(f"t{i}" for i in range(7))):
            io.read(io.open_array(url, name), mesh, [Shard(0)], index={0: 3})

    texts = [t for found, _ in told(2, run) for t in found]
    assert len(texts) == 1 and "2.0 times as many" in texts[0]
    monkeypatch.setattr(chunks, "_warned", set())
    monkeypatch.setattr(chunks, "SMALL", 12 * 16 * 4 + 1)
    assert all(not found for found, _ in told(2, run))

"""Stores that are no folders of their own: references into other files, archives, caches, versioned stores."""

import json
import os

import numpy as np
import pytest
import torch
from samples import mesh_of
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import io

pytestmark = pytest.mark.filterwarnings("ignore:.*times as many")
zarr = pytest.importorskip("zarr")
h5py = pytest.importorskip("h5py")
pytest.importorskip("fsspec")
SHAPE, CHUNKS = (4, 6, 8), (1, 3, 8)
VALUES = np.random.default_rng(0).normal(size=SHAPE).astype("f4")
DIMS = ["time", "latitude", "longitude"]


def references(tmp_path):
    """A Zarr store as kerchunk writes it: chunks are ranges of bytes of an HDF5 file."""
    axes = {
        "time": np.arange(4) * 6,
        "latitude": np.linspace(-75, 75, 6),
        "longitude": np.arange(8) * 45.0,
    }
    refs = {".zgroup": json.dumps({"zarr_format": 2})}
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w") as f:
        for name, values, dims in [("t", VALUES, DIMS), *((n, v, [n]) for n, v in axes.items())]:
            chunks = CHUNKS if name == "t" else values.shape
            made = f.create_dataset(name, data=values, chunks=chunks)
            refs[f"{name}/.zarray"] = json.dumps(dict(
                zarr_format=2, shape=values.shape, chunks=chunks, dtype=values.dtype.str, order="C",
                compressor=None, filters=None, fill_value=None,
            ))  # fmt: skip
            attrs = {"_ARRAY_DIMENSIONS": dims}
            if name == "time":
                attrs["units"] = "hours since 1959-01-01"
            refs[f"{name}/.zattrs"] = json.dumps(attrs)
            for i in range(made.id.get_num_chunks()):
                at = made.id.get_chunk_info(i)
                key = ".".join(str(o // n) for o, n in zip(at.chunk_offset, chunks, strict=True))
                refs[f"{name}/{key}"] = [path, at.byte_offset, at.size]
    (tmp_path / "refs.json").write_text(json.dumps({"version": 1, "refs": refs}))
    return f"reference://::file://{tmp_path}/refs.json"


def rows(open_it):
    """Row 2 by two ranks, cut unevenly."""

    def run():
        mesh = mesh_of((1, 2))["domain"]
        x = io.read(open_it(), mesh, [Shard(0)], index={0: 2}, sizes={0: [5, 1]})
        return x.full_tensor()

    for found in st.simulate(2, run):
        np.testing.assert_array_equal(found, VALUES[2])


def test_references_into_another_file(tmp_path):
    url = references(tmp_path)
    rows(lambda: io.open_array(url, "t"))

    def run():
        mesh = mesh_of((1, 3))
        data = io.LatLon(url, ["t"], mesh["domain"], [Shard(1)])
        loader = io.Loader(data, mesh, sampler=range(3), workers=1)
        return [(b["x"].full_tensor(), b["y"].full_tensor()) for b in loader]

    for found in st.simulate(3, run):
        for i, (x, y) in enumerate(found):
            np.testing.assert_array_equal(x[0, 0], VALUES[i])
            np.testing.assert_array_equal(y[0, 0], VALUES[i + 1])


def test_files_in_caches_and_archives(tmp_path):
    netCDF4 = pytest.importorskip("netCDF4")
    references(tmp_path)
    rows(lambda: io.open_array(f"simplecache::file://{tmp_path}/a.h5", "t"))
    with zarr.storage.ZipStore(tmp_path / "a.zip", mode="w") as store:
        zarr.create_array(store=store, name="t", data=VALUES, chunks=CHUNKS)
    rows(lambda: io.open_array(f"zip://::file://{tmp_path}/a.zip", "t"))
    with netCDF4.Dataset(tmp_path / "a.nc", "w", format="NETCDF3_CLASSIC") as f:
        for name, n in zip(DIMS, SHAPE, strict=True):
            f.createDimension(name, n)
        f.createVariable("t", "f4", DIMS)[:] = VALUES
    rows(lambda: io.open_array(f"simplecache::file://{tmp_path}/a.nc", "t"))
    os.rename(tmp_path / "a.nc", tmp_path / "b.nc")
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://b.nc", "wb") as f:
        f.write((tmp_path / "b.nc").read_bytes())
    with pytest.raises(ValueError, match=r"give simplecache::memory://b\.nc, or copy it"):
        io.open_array("memory://b.nc", "t")


def test_a_store_of_zarr_as_it_is():
    store = zarr.storage.MemoryStore()
    zarr.create_array(store=store, name="t", data=VALUES, chunks=CHUNKS)
    rows(lambda: io.open_array(store, "t"))


def test_a_session_of_icechunk(tmp_path):
    icechunk = pytest.importorskip("icechunk")
    repository = icechunk.Repository.create(
        icechunk.local_filesystem_storage(str(tmp_path / "ice"))
    )
    session = repository.writable_session("main")
    group = zarr.open_group(session.store, mode="a")
    group.create_array("t", data=VALUES, chunks=CHUNKS, dimension_names=DIMS)
    first = session.commit("as it was")
    session = repository.writable_session("main")
    zarr.open_group(session.store, mode="a")["t"][:] = 0
    session.commit("as it is")
    rows(lambda: io.open_array(repository.readonly_session(snapshot_id=first).store, "t"))
    now = io.open_array(repository.readonly_session("main").store, "t")
    assert not torch.from_numpy(now.read([(0, n) for n in SHAPE])).any()

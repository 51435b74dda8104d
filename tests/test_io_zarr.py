"""Sharded tensors as Zarr arrays, which zarr and xarray read."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from test_io_arrays import sharded
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import io
from shardtensor import testing as T

zarr = pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")
VALUES = np.random.default_rng(0).normal(size=(5, 9, 14)).astype(np.float32)


def written(url, mesh, placements, sizes, chunks, version):
    x = st.distribute_tensor(torch.from_numpy(VALUES), T.make_mesh(mesh), placements, sizes=sizes)
    dims = ["time", "y", "x"]
    io.write_zarr(x, url, "t", chunks=chunks, dims=dims, attrs={"units": "K"}, zarr_format=version)
    dims[0] = "step"
    io.write_zarr(x[0], url, "steps", step=2, dims=dims)
    io.write_zarr(x[1], url, "steps", step=0, dims=dims)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "mesh, placements, sizes, chunks",
    [
        ((1,), [Shard(1)], None, None),
        ((2,), [Shard(2)], {2: (3, 11)}, (2, 3, 5)),
        ((3,), [Shard(1)], {1: (8, 0, 1)}, (5, 2, 14)),
        ((2, 2), [Shard(1), Shard(2)], None, (1, 4, 4)),
        ((2, 2), [Replicate(), Shard(2)], None, None),
        ((4,), [Shard(1)], None, (5, 9, 14)),
    ],
)
def test_writes_what_zarr_and_xarray_read(tmp_path, version, mesh, placements, sizes, chunks):
    url = str(tmp_path / "out.zarr")
    n = int(np.prod(mesh))
    st.simulate(n, written, url, mesh, placements, sizes, chunks, version)
    group = zarr.open_group(url, mode="r")
    assert group.metadata.zarr_format == version
    np.testing.assert_array_equal(group["t"][:], VALUES)
    np.testing.assert_array_equal(
        group["steps"][:], np.stack([VALUES[1], 0 * VALUES[0], VALUES[0]])
    )
    data = xr.open_zarr(url, consolidated=False)
    assert data["t"].dims == ("time", "y", "x") and data["t"].attrs["units"] == "K"
    np.testing.assert_array_equal(data["t"].values, VALUES)


@pytest.mark.gloo
def test_processes_write_and_read(tmp_path):
    url = str(tmp_path / "out.zarr")
    args = url, (2,), [Shard(2)], {2: (3, 11)}, (5, 4, 4), 3
    T.run_workers(2, written, *args)
    np.testing.assert_array_equal(zarr.open_group(url, mode="r")["t"][:], VALUES)
    whole, wanted = zip(*T.run_workers(2, sharded, url, "t", (2,), [Shard(0)], None), strict=True)
    np.testing.assert_array_equal(whole[0], VALUES[3])
    assert wanted == (5 * 14 * 4, 4 * 14 * 4)


class Owners(zarr.storage.LocalStore):
    """Notes which chunks this thread's rank writes."""

    written: ClassVar = {}

    async def set(self, key, value):
        if "/c/" in key:
            self.written.setdefault(key, []).append(1)
        await super().set(key, value)


def test_no_chunk_is_written_twice(tmp_path, monkeypatch):
    """Shards of 3 and 11 rows, chunks of 4: rows move before they are written."""
    monkeypatch.setattr(Owners, "written", {})
    opened = zarr.open_group

    def counted(url, **kwargs):
        return opened(Owners(url), **kwargs)

    monkeypatch.setattr(zarr, "open_group", counted)
    st.simulate(2, written, str(tmp_path / "o.zarr"), (2,), [Shard(2)], {2: (3, 11)}, (5, 9, 4), 3)
    assert Owners.written and set(map(len, Owners.written.values())) == {1}


def conflicting(url):
    x = st.distribute_tensor(torch.zeros(4, 6), T.make_mesh((2,)), [Shard(0)])
    io.write_zarr(x, url, "t")
    for bad, kwargs in [(x.double(), {}), (x[:, :3], {}), (x, dict(chunks=(1, 6)))]:
        with pytest.raises((ValueError, RuntimeError), match=r"is there|could not be made"):
            io.write_zarr(bad, url, "t", **kwargs)
    with pytest.raises(ValueError, match="chunks"):
        io.write_zarr(x, url, "u", chunks=(2,))
    with pytest.raises((ValueError, RuntimeError), match=r"dims|could not be made"):
        io.write_zarr(x, url, "u", dims=["x"])
    io.write_zarr(x + 1, url, "t")


def test_conflicts_raise_on_every_rank(tmp_path):
    url = str(tmp_path / "c.zarr")
    st.simulate(2, conflicting, url)
    np.testing.assert_array_equal(zarr.open_group(url)["t"][:], np.ones((4, 6)))


def test_numbers_of_numpy(tmp_path):
    """Steps and attributes may be; a fill value is where xarray looks for it."""
    attrs = {"a": np.float32(1), "b": np.arange(3), "_FillValue": np.float32(-1)}
    values = torch.view_as_complex(torch.from_numpy(VALUES[:, :, :2]).contiguous()).conj()

    def run():
        x = st.distribute_tensor(torch.from_numpy(VALUES[0]), T.make_mesh((2,)), [Shard(0)])
        for step in np.arange(2):
            io.write_zarr(
                x.round(),
                tmp_path / "a.zarr",
                "t",
                step=step,
                dims=("t", "y", "x"),
                attrs=attrs,
            )
        same = dict(zarr.open_group(tmp_path / "a.zarr")["t"].attrs)
        io.write_zarr(x.round(), tmp_path / "a.zarr", "same", dims=("y", "x"), attrs=same)
        x = st.distribute_tensor(values, T.make_mesh((2,)), [Shard(0)])
        io.write_zarr(x, tmp_path / "b.zarr", "conj")

    st.simulate(2, run)
    found = xr.open_zarr(tmp_path / "a.zarr")["t"]
    for x in (found, xr.open_zarr(tmp_path / "a.zarr")["same"]):
        assert x.attrs == {"a": 1.0, "b": [0, 1, 2]} and x.encoding["_FillValue"] == -1
    np.testing.assert_array_equal(
        found[1], np.where(VALUES[0].round() == -1, np.nan, VALUES[0].round())
    )
    np.testing.assert_array_equal(
        zarr.open_group(tmp_path / "b.zarr")["conj"][:], values.resolve_conj().numpy()
    )


@pytest.mark.parametrize(
    "name, options, told",
    [
        ("u", dict(dims=("y", "y")), "a name for each"),
        ("u", dict(dims=(0, 1)), "a name for each"),
        ("u", dict(zarr_format=4), "zarr_format 4"),
        ("t/u", {}, "t is no group but an array"),
        ("deep", {}, "a group is there"),
        ("s", dict(step=1), "coordinate time is there with 1 values and none for it"),
        ("u", dict(dims=lambda rank: ("y", f"x{rank}")), "ranks part"),
    ],
)
def test_what_has_no_place_is_told_on_every_rank(tmp_path, name, options, told):
    url = str(tmp_path / "a.zarr")

    def run():
        mesh = T.make_mesh((2,))
        x = st.distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
        io.write_zarr(x, url, "t")
        io.write_zarr(x, url, "deep/t")
        io.write_zarr(x, url, "s", step=0, dims=("time", "y", "x"), coords={"time": 0})
        given = {k: v(mesh.get_rank()) if callable(v) else v for k, v in options.items()}
        with pytest.raises((ValueError, RuntimeError), match=told):
            io.write_zarr(x, url, name, **given)

    st.simulate(2, run)
    assert zarr.open_group(url)["s"].shape == (1, 4, 3)


@pytest.mark.parametrize("name", ["time", "deep/time"])
def test_a_coordinate_of_the_steps_is_written_by_itself(tmp_path, name):
    def run():
        hour = st.distribute_tensor(torch.tensor(6.0), T.make_mesh((2,)), [Replicate()])
        for step in range(3):
            io.write_zarr(hour * step, tmp_path / "a.zarr", name, step=step, dims=("time",))

    st.simulate(2, run)
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "a.zarr")[name][:], [0, 6, 12])


def test_dtypes_that_zarr_has_not(tmp_path):
    def run():
        x = st.ShardTensor.from_local(
            torch.ones(4).to(torch.float8_e5m2), T.make_mesh((2,)), [Shard(0)]
        )
        io.write_zarr(x, tmp_path / "a.zarr", "t")

    with pytest.raises(st.RankError, match=r"write_zarr of torch.*e5m2, which Zarr has not"):
        st.simulate(2, run)
    assert not (tmp_path / "a.zarr").exists()

"""Blocks of arrays in files: against NumPy, h5py, netCDF4, zarr and xarray."""

import threading
import warnings

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

import shardtensor as st
from shardtensor import io
from shardtensor import testing as T
from shardtensor.io import chunks
from shardtensor.io.collate import collate

h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")

VALUES = np.random.default_rng(0).normal(size=(5, 9, 14)).astype(np.float32)


def make_npy(path):
    np.save(path / "a.npy", VALUES)
    return str(path / "a.npy"), None


def make_npy_url(path):
    np.save(path / "b.npy", VALUES)
    return f"file://{path}/b.npy", None


def make_h5(path):
    with h5py.File(path / "a.h5", "w") as f:
        f.create_group("fields").create_dataset("t", data=VALUES.astype(">f4"), chunks=(1, 4, 5))
        f["other"] = np.arange(3)
    return str(path / "a.h5"), "fields/t"


def make_h5_url(path):
    make_h5(path)
    return f"file://{path}/a.h5", "fields/t"


def make_zarr(path, version, url=False, shards=None):
    name = f"z{version}{bool(shards)}.zarr"
    group = zarr.open_group(str(path / name), mode="w", zarr_format=version)
    group.create_array("t", shape=VALUES.shape, chunks=(1, 4, 5), dtype="f4", shards=shards)
    group["t"][:] = VALUES
    group.create_array("other", shape=(3,), dtype="i4")
    return (f"file://{path}/{name}" if url else str(path / name)), "t"


def make_memory(path):
    group = zarr.open_group("memory://shardtensor-test.zarr", mode="w")
    group.create_array("t", data=VALUES, chunks=(2, 9, 7))
    return "memory://shardtensor-test.zarr", None


def make_nc(path, kind):
    data = xr.Dataset({"t": (("time", "y", "x"), VALUES)}, {"y": np.arange(9.0)})
    data.to_netcdf(path / f"{kind}.nc", format=kind, engine="netcdf4")
    return str(path / f"{kind}.nc"), "t"


def make_xarray(path):
    return xr.Dataset({"t": (("time", "y", "x"), VALUES)}), "t"


FILES = {
    "npy": make_npy,
    "npy by URL": make_npy_url,
    "hdf5": make_h5,
    "hdf5 by URL": make_h5_url,
    "zarr 2": lambda p: make_zarr(p, 2),
    "zarr 3": lambda p: make_zarr(p, 3),
    "zarr 3 by URL": lambda p: make_zarr(p, 3, True),
    "zarr 3 in shards": lambda p: make_zarr(p, 3, shards=(5, 8, 15)),
    "zarr in memory": make_memory,
    "netcdf 3": lambda p: make_nc(p, "NETCDF3_64BIT"),
    "netcdf 4": lambda p: make_nc(p, "NETCDF4"),
    "xarray": make_xarray,
}


@pytest.mark.parametrize("kind", FILES)
def test_reads_any_block(tmp_path, kind):
    source = io.open_array(*FILES[kind](tmp_path))
    assert source.shape == VALUES.shape and source.dtype == np.float32
    for ranges in [((0, 5), (0, 9), (0, 14)), ((2, 3), (4, 9), (1, 13)), ((1, 4), (3, 3), (0, 2))]:
        block = source.read(ranges)
        assert block.dtype == np.float32 and block.flags.c_contiguous
        np.testing.assert_array_equal(block, VALUES[tuple(slice(a, b) for a, b in ranges)])
    with pytest.raises(IndexError, match="rows 4 to 10 of a dim of size 9"):
        source.read([(0, 1), (4, 10), (0, 1)])
    if "netcdf" in kind or kind == "xarray":
        assert source.dims == ("time", "y", "x")


def sharded(where, variable, mesh, placements, sizes):
    source = io.open_array(where, variable)
    with st.trace() as t:
        x = io.read(source, T.make_mesh(mesh), placements, index={0: 3}, sizes=sizes)
    assert not t.sent
    # no more than the block: what the file has beyond it is never in memory
    assert source.bytes_wanted == x.to_local().numel() * 4
    return x.full_tensor().numpy(), source.bytes_wanted


@pytest.mark.parametrize("kind", ["npy", "hdf5", "zarr 3", "netcdf 4"])
@pytest.mark.parametrize(
    "mesh, placements, sizes",
    [
        ((1,), [Shard(0)], None),
        ((2,), [Shard(0)], {0: (2, 7)}),
        ((3,), [Shard(1)], {1: (14, 0, 0)}),
        ((4,), [Shard(0)], None),
        ((2, 2), [Shard(0), Shard(1)], {1: (3, 11)}),
        ((2, 2), [Shard(1), Shard(1)], None),
        ((2, 2), [Replicate(), Shard(1)], None),
    ],
)
def test_each_rank_reads_its_block(tmp_path, kind, mesh, placements, sizes):
    where, variable = FILES[kind](tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        n = int(np.prod(mesh))
        for whole, _ in st.simulate(n, sharded, where, variable, mesh, placements, sizes):
            np.testing.assert_array_equal(whole, VALUES[3])


def test_index_by_name_slices_and_dtype(tmp_path):
    st.simulate(1, indexed, *make_nc(tmp_path, "NETCDF4"))


def indexed(where, variable):
    mesh = T.make_mesh((1,))
    places = [Replicate()]
    x = io.read(io.open_array(where, variable), mesh, places, index={"time": slice(1, 4), "x": -1})
    np.testing.assert_array_equal(x.to_local().numpy(), VALUES[1:4, :, -1])
    double = io.read(io.open_array(where, variable), mesh, places, dtype=torch.float64)
    assert double.dtype == torch.float64
    source = io.open_array(where, variable)
    for index, error, text in [
        ({"level": 0}, ValueError, "no dim 'level'.*time"),
        ({7: 0}, ValueError, "no dim 7"),
        ({"time": 5}, IndexError, "row 5 of dim time, which has 5"),
        ({"time": slice(0, 4, 2)}, ValueError, "steps of 1"),
        *(({0: at}, ValueError, "give a row or a slice") for at in (True, [0], 1.5, None, ...)),
        ({0: slice(1.0, 2.0)}, ValueError, "give a row or a slice"),
        ({"time": 1, -3: 2}, ValueError, "names dim 0 twice"),
        ({True: 1}, ValueError, "True is no dim"),
        ([1], ValueError, "give a dict of dims"),
    ]:
        with pytest.raises(error, match=text):
            io.read(source, mesh, places, index=index)
    with pytest.raises(ValueError, match="not read into"):
        io.read(source, mesh, [Partial()])
    with pytest.raises(ValueError, match="'float64': give one of torch"):
        io.read(source, mesh, places, dtype="float64")
    spec = io.spec_of(source, mesh, places, {0: 2})
    with pytest.raises(ValueError, match=r"a spec of .* for an array of"):
        io.read_block(source, spec)
    for halo in ({0: (-1, 0)}, {2: (1, 1)}):
        with pytest.raises(ValueError, match="a halo of"):
            io.read_block(source, spec, index={0: 2}, halo=halo)


def halos(where):
    source = io.open_array(where)
    spec = io.spec_of(source, T.make_mesh((3,)), [Shard(1)], {0: 2}, {1: (2, 5, 7)})
    found = io.read_block(source, spec, index={0: 2}, halo={1: (3, 1)})
    assert torch.equal(found, io.read_block(source, spec, index={0: 2}, halo={-1: (3, 1)}))
    return found.numpy()


def test_halo_ends_with_the_array(tmp_path):
    where, _ = make_npy(tmp_path)
    found = st.simulate(3, halos, where)
    for block, (a, b) in zip(found, [(0, 3), (0, 8), (4, 14)], strict=True):
        np.testing.assert_array_equal(block, VALUES[2, :, a:b])


def test_packed_values_become_floats(tmp_path):
    """scale_factor, add_offset and _FillValue as xarray undoes them."""
    values = VALUES.copy()
    values[0, 0, :3] = np.nan
    data = xr.Dataset({"t": (("time", "y", "x"), values)})
    packing = dict(dtype="i2", scale_factor=0.01, add_offset=3.0, _FillValue=-32767)
    for kind in ("NETCDF4", "NETCDF3_64BIT"):
        path = tmp_path / f"{kind}.nc"
        data.to_netcdf(path, format=kind, engine="netcdf4", encoding={"t": packing})
        source = io.open_array(str(path), "t")
        found = source.read([(0, 5), (0, 9), (0, 14)])
        expected = xr.open_dataset(path)["t"].values
        assert found.dtype == np.float32 and np.isnan(found).sum() == 3
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert source.bytes_wanted == VALUES.size * 2


def test_arrays_that_torch_has_not(tmp_path):
    with pytest.raises(TypeError, match=r"masked array: give x.filled"):
        io.open_array(np.ma.array(VALUES, mask=VALUES > 0))
    with pytest.raises(ValueError, match=f"{np.dtype(np.longdouble)} is not a dtype of numbers"):
        io.open_array(VALUES.astype(np.longdouble))
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["null"] = h5py.Empty("f4")
    with pytest.raises(ValueError, match=r"a.h5: null: it has no values, not even a shape"):
        io.open_array(tmp_path / "a.h5")


def test_a_variable_with_the_name_of_a_dim(tmp_path):
    """NetCDF 4 stores it under another name where it is no coordinate."""
    xr.Dataset({"x": (("y", "x"), VALUES[0])}).to_netcdf(tmp_path / "a.nc", format="NETCDF4")
    for name in (None, "x", "/x"):
        source = io.open_array(tmp_path / "a.nc", name)
        assert source.dims == ("y", "x")
        found = source.read([(0, n) for n in source.shape])
        np.testing.assert_array_equal(found, VALUES[0])
    with pytest.raises(ValueError, match=r"'wind'; there are x$"):
        io.open_array(tmp_path / "a.nc", "wind")


def test_missing_things_are_named(tmp_path):
    where, _ = make_zarr(tmp_path, 3)
    with pytest.raises(ValueError, match="'wind'; there are other, t"):
        io.open_array(where, "wind")
    with pytest.raises(ValueError, match="None; there are other, t"):
        io.open_array(where)
    with pytest.raises(FileNotFoundError):
        io.open_array(str(tmp_path / "none.zarr"), "t")
    with pytest.raises(FileNotFoundError):
        io.open_array(str(tmp_path / "none.h5"), "t")
    np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        io.open_array(str(tmp_path / "o.npy"))
    with pytest.raises(ValueError, match="numbers"):
        io.open_array(f"file://{tmp_path}/o.npy")


class Counted(zarr.storage.LocalStore):
    """Counts the bytes of chunks that are fetched."""

    fetched = 0

    async def get(self, key, prototype, byte_range=None):
        found = await super().get(key, prototype, byte_range)
        if "/c/" in key and found is not None:
            Counted.fetched += len(found)
        return found


def test_report_tells_what_the_store_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "SMALL", 0)
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    group.create_array("t", data=VALUES, chunks=(1, 4, 7), compressors=None)

    def amplified():
        Counted.fetched = 0
        source = io.open_array(zarr.open_group(Counted(tmp_path / "a.zarr"), mode="r"), "t")
        mesh = T.make_mesh((2,))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            io.read(source, mesh, [Shard(1)], index={0: 1}, sizes={1: (6, 8)})
            io.read(source, mesh, [Shard(1)], index={0: 1}, sizes={1: (6, 8)})
        spec = io.spec_of(source, mesh, [Shard(1)], {0: 1}, {1: (6, 8)})
        told = io.report(source, spec, index={0: 1})
        texts = [str(w.message) for w in caught]
        # chunks at the array's end are stored whole
        return Counted.fetched, 2 * told.touched, told, texts

    (fetched, touched, told, texts), (more, both, wide, none) = amplified_on(2, amplified)
    # rows 0:9 lie in three chunks of 4 rows: 12 are stored
    assert fetched * 9 == touched * 12 and more * 9 == both * 12
    assert told.wanted == 9 * 6 * 4 and told.touched == 9 * 7 * 4
    assert wide.wanted == 9 * 8 * 4 and wide.touched == 9 * 14 * 4
    assert wide.amplification == pytest.approx(14 / 8)
    assert wide.aligned == {1: (7, 7)}
    # the first rank tells what the second reads
    assert len(texts) == 1 and "{1: (7, 7)}" in texts[0] and "1.8 times" in texts[0]
    assert not none


def amplified_on(n, fn):
    """One rank after the other: warnings are caught for the whole process."""
    turn = threading.Lock()

    def alone():
        with turn:
            return fn()

    return st.simulate(n, alone)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_aligned_sizes_touch_no_chunk_twice(tmp_path, n):
    where, variable = make_zarr(tmp_path, 3)

    def run():
        source = io.open_array(where, variable)
        mesh = T.make_mesh((n,))
        sizes = io.aligned_sizes(source, mesh, [Shard(2)])
        x = io.read(source, mesh, [Shard(2)], sizes=sizes)
        return x.full_tensor().numpy(), source.bytes_touched, source.bytes_wanted, sizes[2]

    found = st.simulate(n, run)
    sizes = found[0][3]
    assert sum(sizes) == 14 and len(sizes) == n
    assert all(end % 5 == 0 or end == 14 for end in np.cumsum(sizes))
    assert max(sizes) <= 5 * -(-3 // n)
    for whole, touched, wanted, _ in found:
        np.testing.assert_array_equal(whole, VALUES)
        assert touched == wanted


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_arrays_upside_down(rows):
    """NumPy calls one row contiguous, whose stride is below 0; torch takes none."""
    x = VALUES[:rows, 0][::-1]
    for blocks in st.simulate(2, lambda: io.read(x, T.make_mesh((2,)), [Shard(0)]).full_tensor()):
        assert blocks.equal(torch.from_numpy(x.copy()))
    assert collate([x[:1], x[:1]]).equal(torch.from_numpy(np.stack([x[:1]] * 2)))

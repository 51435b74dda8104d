"""Packed and masked numbers, of every format, as xarray decodes them; arrays in other processes."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate
from torch.utils.data import DataLoader

import shardtensor as st
from shardtensor import io
from shardtensor import testing as T
from shardtensor.io import Source

h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")
netCDF4 = pytest.importorskip("netCDF4")

STORED = np.array([[-9999, -1, 0, 5], [7, 100, 127, 3]])


def as_zarr(path, dtype, attrs, version):
    group = zarr.open_group(str(path / "a.zarr"), mode="w", zarr_format=version)
    attrs = {k: v.item() if isinstance(v, np.generic) else v for k, v in attrs.items()}
    names, more = ["y", "x"], {"fill_value": None}
    if version == 2:
        attrs["_ARRAY_DIMENSIONS"] = names
        more["fill_value"] = attrs.pop("_FillValue", None)
    else:
        more = {"dimension_names": names}
        if "_FillValue" in attrs and np.dtype(dtype).kind == "f":
            coder = xr.backends.zarr.FillValueCoder
            attrs["_FillValue"] = coder.encode(attrs["_FillValue"], np.dtype(dtype))
    group.create_array("t", data=STORED.astype(dtype), chunks=(1, 3), **more).attrs.update(attrs)
    return path / "a.zarr"


def as_netcdf(path, dtype, attrs, form):
    with netCDF4.Dataset(path / "a.nc", "w", format=form) as f:
        f.createDimension("y", 2), f.createDimension("x", 4)
        attrs = dict(attrs)
        made = f.createVariable("t", dtype, ("y", "x"), fill_value=attrs.pop("_FillValue", None))
        made.set_auto_maskandscale(False)
        for k, v in attrs.items():
            made.setncattr(k, v)
        made[:] = STORED.astype(dtype)
    return path / "a.nc"


def as_hdf5(path, dtype, attrs):
    """Scales without variables, as netCDF reads plain HDF5."""
    with h5py.File(path / "b.nc", "w") as f:
        f["t"] = STORED.astype(dtype)
        f["t"].attrs.update(
            {k: np.bytes_(v) if isinstance(v, str) else v for k, v in attrs.items()}
        )
    return path / "b.nc"


FORMATS = {
    "zarr 2": lambda *a: as_zarr(*a, 2),
    "zarr 3": lambda *a: as_zarr(*a, 3),
    "netcdf 4": lambda *a: as_netcdf(*a, "NETCDF4"),
    "netcdf 3": lambda *a: as_netcdf(*a, "NETCDF3_CLASSIC"),
    "hdf5": as_hdf5,
}
CASES = {
    "fill": ("i2", {"_FillValue": np.int16(-9999)}, np.float32),
    "fill of floats": ("f4", {"_FillValue": np.float32(-9999)}, np.float32),
    "fill of doubles": ("f8", {"_FillValue": np.float64(-9999)}, np.float64),
    "fill is NaN": ("f4", {"_FillValue": np.float32("nan")}, np.float32),
    "missing_value only": ("i2", {"missing_value": np.int16(-1)}, np.float32),
    "missing_value of int32": ("i4", {"missing_value": np.int32(-9999)}, np.float64),
    "both": ("i4", {"_FillValue": np.int32(-9999), "missing_value": np.int32(5)}, np.float64),
    "not representable": ("i2", {"missing_value": np.float64(1e20)}, np.float32),
    "unsigned": ("i1", {"_Unsigned": "true"}, np.uint8),
    "unsigned with fill": ("i1", {"_Unsigned": "true", "_FillValue": np.int8(-1)}, np.float32),
    "unsigned, packed": (
        "i1", {"_Unsigned": "true", "_FillValue": np.int8(-1), "scale_factor": 0.5}, np.float32,
    ),
    "unsigned is false": ("i2", {"_Unsigned": "false"}, np.int16),
    "scale": ("i2", {"scale_factor": 0.01}, np.float32),
    "offset": ("i2", {"add_offset": 273.15}, np.float32),
    "offset too large for float32": ("i2", {"scale_factor": 0.001, "add_offset": 1e6}, np.float64),
    "packed": (
        "i2", {"scale_factor": 0.01, "add_offset": 3.0, "_FillValue": np.int16(-9999)}, np.float32,
    ),
    "packed floats": ("f4", {"scale_factor": 2.0, "_FillValue": np.float32(-9999)}, np.float32),
    "range": ("i2", {"valid_min": np.int16(0), "valid_max": np.int16(9)}, np.int16),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_xarray(tmp_path, form, case):
    dtype, attrs, wanted = CASES[case]
    path = FORMATS[form](tmp_path, dtype, attrs)
    engine = {"engine": "zarr", "consolidated": False} if "zarr" in form else {"engine": "netcdf4"}
    with xr.open_dataset(path, mask_and_scale=True, decode_times=False, **engine) as data:
        expected = data["t"].values
    source = io.open_array(path, "t")
    found = source.read([(0, 2), (0, 4)])
    assert found.dtype == source.dtype == wanted
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(source.read([(1, 2), (2, 4)]), found[1:, 2:])


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("fill", [-9999.0, np.nan, 0.0])
def test_what_xarray_wrote(tmp_path, version, fill):
    values = np.array([[1.0, np.nan, 0.0], [fill, 2.0, 3.0]], dtype=np.float32)
    data = xr.Dataset({"t": (("y", "x"), values), "n": (("y", "x"), values > 1)})
    data.to_zarr(tmp_path / "a.zarr", zarr_format=version, encoding={"t": {"_FillValue": fill}})
    with xr.open_zarr(tmp_path / "a.zarr") as back:
        for name in ("t", "n"):
            found = io.open_array(tmp_path / "a.zarr", name).read([(0, 2), (0, 3)])
            np.testing.assert_array_equal(found, back[name].values)


def test_the_only_variable_of_a_file(tmp_path):
    """Dims without coordinates are arrays in HDF5, but no variables."""
    path = as_netcdf(tmp_path, "i2", {}, "NETCDF4")
    source = io.open_array(path)
    assert source.dims == ("y", "x")
    np.testing.assert_array_equal(source.read([(0, 2), (0, 4)]), STORED)


def test_fill_of_plain_zarr_is_a_number(tmp_path):
    """Zarr 2 gives every array a fill value of 0; only xarray's convention makes it a mask."""
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=2)
    group.create_array("t", data=STORED, fill_value=0)
    np.testing.assert_array_equal(io.open_array(tmp_path / "a.zarr").read([(0, 2), (0, 4)]), STORED)


@pytest.mark.parametrize("key", ["_FillValue", "missing_value", "scale_factor", "add_offset"])
def test_attributes_that_are_not_numbers(tmp_path, key):
    path = as_hdf5(tmp_path, "f4", {key: "none"})
    with pytest.raises(ValueError, match=f"b.nc: t: {key} is 'none'; expected"):
        io.open_array(path, "t")


# in xarray's hands ---------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 6, 8)).astype(np.float32)
    data = xr.Dataset(
        {"t": (("time", "y", "x"), values)},
        {"y": np.arange(6.0), "time": np.datetime64("2000-01-01", "ns") + np.arange(5)},
    )
    data.to_zarr(tmp_path / "a.zarr", encoding={"t": {"chunks": (1, 4, 3)}})
    with xr.open_zarr(tmp_path / "a.zarr", chunks=None) as lazy:
        yield lazy, values


def test_selections_of_xarray(dataset):
    st.simulate(1, selected, *dataset)


def selected(lazy, values):
    t, mesh = lazy["t"], T.make_mesh((1,))

    def read(x, **options):
        return io.read(x, mesh, [Replicate()], **options).to_local().numpy()

    np.testing.assert_array_equal(read(t.sel(y=slice(1.0, 3.0))), values[:, 1:4])
    np.testing.assert_array_equal(read(t.isel(time=2), index={"x": slice(2, 7)}), values[2, :, 2:7])
    np.testing.assert_array_equal(read(t.transpose("x", "y", "time")), values.transpose(2, 1, 0))
    np.testing.assert_array_equal(read(t.isel(x=[5, 1])), values[:, :, [5, 1]])
    np.testing.assert_array_equal(read(t * 2 + 1), values * 2 + 1)
    np.testing.assert_array_equal(read(t.isel(time=0, y=1, x=2)), values[0, 1, 2])
    np.testing.assert_array_equal(read(t[0], index={"x": 1, "y": -1}), values[0, -1, 1])
    np.testing.assert_array_equal(read(io.open_array(lazy, "y")), np.arange(6.0))
    assert io.open_array(t.transpose("x", "y", "time")).chunks == (3, 4, 1)
    with pytest.raises(ValueError, match=r"time: datetime64.* is not a dtype of numbers"):
        read(lazy["time"])
    with pytest.raises(TypeError, match="open_array of a list"):
        io.open_array([1.0])


@pytest.mark.parametrize("case", CASES)
def test_what_xarray_has_not_decoded(tmp_path, case):
    dtype, attrs, wanted = CASES[case]
    path = as_netcdf(tmp_path, dtype, attrs, "NETCDF4")
    with xr.open_dataset(path, decode_cf=False) as raw:
        if case == "packed floats":
            with pytest.raises(ValueError, match="it may be decoded already"):
                io.open_array(raw, "t")
            return
        source = io.open_array(raw, "t")
        found = source.read([(0, 2), (0, 4)])
        np.testing.assert_array_equal(found, io.open_array(path, "t").read([(0, 2), (0, 4)]))
        assert found.dtype == source.dtype == wanted
        # decoded by hand, attributes kept
        if "scale" in case:
            with pytest.raises(ValueError, match="it may be decoded already"):
                io.open_array((raw["t"] * 0.01).assign_attrs(attrs))


# other processes ------------------------------------------------------------------------------------

VALUES = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


def make(kind, path):
    """Something to open, and what to keep alive."""
    if kind in ("npy", "npy url"):
        np.save(path / "a.npy", VALUES)
        return ("file://" if "url" in kind else "") + str(path / "a.npy")
    if "hdf5" in kind:
        with h5py.File(path / "a.h5", "w") as f:
            f["t"] = VALUES
        if kind == "hdf5 object":
            return h5py.File(path / "a.h5")["t"]
        return ("file://" if "url" in kind else "") + str(path / "a.h5")
    if "zarr" in kind:
        zarr.create_array(str(path / "a.zarr"), data=VALUES)
        return zarr.open(str(path / "a.zarr")) if "object" in kind else path / "a.zarr"
    data = xr.Dataset({"t": (("y", "x"), VALUES)})
    if kind == "xarray in memory":
        return data
    data.to_netcdf(path / "a.nc", format="NETCDF3_64BIT" if kind == "netcdf 3" else "NETCDF4")
    return xr.open_dataset(path / "a.nc") if kind == "xarray" else str(path / "a.nc")


KINDS = (
    "npy", "npy url", "hdf5", "hdf5 url", "hdf5 object", "zarr", "zarr object", "netcdf 3",
    "netcdf 4", "xarray", "xarray in memory",
)  # fmt: skip


class Rows:
    """A dataset of the rows of lazy arrays."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        rows = [s.read([(i, i + 1), (0, 6)]) for s in self.sources]
        return torch.from_numpy(np.concatenate(rows))


@pytest.fixture
def sources(tmp_path):
    found = []
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        where = make(kind, tmp_path / kind)
        found.append(io.open_array(where, "t" if "xarray" in kind or "netcdf" in kind else None))
    return found


def test_sources_are_pickled(sources):
    for kind, source in zip(KINDS, sources, strict=True):
        source.read([(0, 1), (0, 2)])
        again = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(again.read([(1, 3), (2, 6)]), VALUES[1:3, 2:], kind)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_torch_loader(sources, start):
    if start == "spawn":
        # the libraries of HDF5 that h5py and netCDF4 bring may not end well together in one process
        sources = [s for k, s in zip(KINDS, sources, strict=True) if k in ("npy", "hdf5", "zarr")]
    for source in sources:
        source.read([(0, 4), (0, 6)])  # files are open, threads run
    context = multiprocessing.get_context(start)
    loader = DataLoader(Rows(sources), batch_size=2, num_workers=1, multiprocessing_context=context)
    found = torch.cat(list(loader))
    assert torch.equal(found, torch.from_numpy(VALUES)[:, None].expand(-1, len(sources), -1))

"""Zarr stores that xarray opens as its own: coordinates, attributes, consolidated metadata."""

import warnings

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import io
from shardtensor import testing as T

zarr = pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")

LAT, LON = np.linspace(60, -60, 7), np.arange(0, 360, 40.0)
TIMES = np.array(["2020-02-28T18", "2020-02-29T00", "2020-03-01T06"], "datetime64[h]")
VALUES = torch.arange(3 * 7 * 9, dtype=torch.float32).reshape(3, 7, 9)
DIMS = ("time", "latitude", "longitude")


def written(url, step, version=3, name="t2m", **more):
    x = st.distribute_tensor(VALUES[step], T.make_mesh((3,)), [Shard(0)], sizes={0: (4, 0, 3)})
    coords = {"time": TIMES[step], "latitude": LAT, "longitude": (LON, {"long_name": "east"})}
    attrs = {"units": "K"}
    io.write_zarr(
        x, url, name, step=step, dims=DIMS, attrs=attrs, coords=coords | more, zarr_format=version
    )


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("group", ["", "member/0"])
def test_xarray_opens_it_without_a_warning(tmp_path, version, group):
    url = str(tmp_path / "a.zarr")
    name = f"{group}/t2m".strip("/")

    def run():
        for step in (0, 2, 1):
            written(url, step, version, name)
            written(url, step, version, name.replace("t2m", "msl"))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        st.simulate(3, run)
        for consolidated in (None, True):
            data = xr.open_zarr(url, group=group or None, consolidated=consolidated).load()
            np.testing.assert_array_equal(data["t2m"].values, VALUES)
            np.testing.assert_array_equal(data["msl"].values, VALUES)
            np.testing.assert_array_equal(data["time"].values, TIMES)
            np.testing.assert_array_equal(data["latitude"].values, LAT)
            np.testing.assert_array_equal(data["longitude"].values, LON)
        assert data["t2m"].dims == DIMS and data["t2m"].attrs == {"units": "K"}
        assert data["latitude"].attrs["units"] == "degrees_north"
        assert data["longitude"].attrs["long_name"] == "east"
        picked = data["t2m"].sel(time="2020-02-29T00", latitude=20.0, longitude=80.0)
        assert float(picked) == float(VALUES[1, 2, 2])


def test_our_own_reader_takes_it(tmp_path):
    url = str(tmp_path / "a.zarr")

    def run():
        for step in range(3):
            written(url, step)
        data = io.LatLon(url, ["t2m"], T.make_mesh((3,)), [Shard(1)])
        return data.times, data[1]["y"].full_tensor()

    times, after = st.simulate(3, run)[0]
    np.testing.assert_array_equal(times, TIMES)
    assert torch.equal(after, VALUES[2:])


@pytest.mark.parametrize(
    "coords, why",
    [
        ({"latitude": LAT[::-1]}, "coords latitude: other values are there"),
        ({"latitude": (LAT, {"units": "radians"})}, "to be written is .7,. in 'radians'"),
        ({"latitude": LAT[:6]}, r"\(6,\) values for a dim of 7 rows"),
        ({"time": TIMES}, r"\(3,\) values for a dim of 1 rows"),
        ({"level": [500]}, "coords level: the dims are"),
        ({"latitude": (1.0, 2.0)}, r"coords latitude: \(2,\) values for a dim of"),
        ({"latitude": (0, 1, 2, 3, 4, 5, 6, 7, 8)}, r"coords latitude: \(9,\) values for a dim of"),
        ({"latitude": np.ma.masked_less(LAT, LAT.max())}, "coords latitude: masked values"),
        ({"t2m": LAT}, "coords t2m: the array has that name"),
        ({"longitude": [str(v) for v in LON]}, "give numbers or datetime64"),
        ({"time": np.datetime64(1500, "ms")}, "parts of a second"),
    ],
)
def test_what_does_not_fit_raises_on_every_rank(tmp_path, coords, why):
    url = str(tmp_path / "a.zarr")

    def run():
        written(url, 0)
        try:
            written(url, 1, **coords)
        except (ValueError, RuntimeError) as e:
            return type(e), str(e)

    found = st.simulate(3, run)
    with pytest.raises(ValueError, match=why):
        raise found[0][0](found[0][1])
    assert all(f is not None for f in found)
    assert xr.open_zarr(url)["t2m"].shape == (1, 7, 9)


def test_a_step_whose_coordinate_the_array_can_not_hold_is_refused(tmp_path):
    url = str(tmp_path / "a.zarr")

    def run():
        written(url, 0, time=0)
        with pytest.raises((ValueError, RuntimeError), match=r"int64 is there|first rank"):
            written(url, 1, time=0.5)
        written(url, 1, time=6)

    st.simulate(3, run)
    assert zarr.open_group(url)["time"][:].tolist() == [0, 6]

    def floats():
        for step, hours in enumerate((0.0, 0.5, float("nan"))):
            written(str(tmp_path / "b.zarr"), step, time=hours)

    st.simulate(3, floats)
    assert np.array_equal(zarr.open_group(tmp_path / "b.zarr")["time"][:], [0, 0.5, np.nan], True)

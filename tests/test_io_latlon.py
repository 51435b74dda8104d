"""Samples of a store in WeatherBench 2's schema: against xarray."""

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import io
from shardtensor import testing as T
from shardtensor.io.latlon import decoded_times

pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")

LEVELS = [50, 500, 850]
TIMES = np.datetime64("1959-01-01T00", "ns") + 6 * np.arange(5) * np.timedelta64(1, "h")


def make(path, order=("latitude", "longitude"), descending=True, version=2):
    """As gs://weatherbench2/datasets/era5/*.zarr: ERA5 on pressure levels and single levels."""
    rng = np.random.default_rng(0)
    latitude = np.linspace(-90, 90, 9)[:: -1 if descending else 1]
    coords = {
        "time": TIMES,
        "latitude": latitude,
        "longitude": np.arange(12) * 30.0,
        "level": ("level", np.array(LEVELS), {"units": "hPa"}),
    }
    sizes = {"latitude": 9, "longitude": 12, "level": 3, "time": 5}

    def field(*dims):
        return dims, rng.normal(280, 20, [sizes[d] for d in dims]).astype(np.float32)

    data = xr.Dataset(
        {
            "2m_temperature": field("time", *order),
            "geopotential": field("time", "level", *order),
            "land_sea_mask": field(*order),
        },
        coords,
    )
    encoding = {name: {"chunks": (1, *data[name].shape[1:])} for name in list(data)[:2]}
    encoding["time"] = {"units": "hours since 1959-01-01", "dtype": "int64"}
    data.to_zarr(path, mode="w", zarr_format=version, encoding=encoding, consolidated=version == 2)
    return data


def expected(data, time, levels):
    dims = "latitude", "longitude"
    rows = [data["2m_temperature"].isel(time=time).transpose(*dims).values[None]]
    rows.append(
        data["geopotential"].isel(time=time).sel(level=levels).transpose("level", *dims).values
    )
    return torch.from_numpy(np.concatenate(rows))


def sample(url, mesh, placements, sizes, levels):
    data = io.LatLon(
        url, ["2m_temperature", "geopotential"], T.make_mesh(mesh), placements,
        levels=levels, sizes=sizes, lead=2,
        mean={"2m_temperature": 280.0, "geopotential": [1.0] * len(levels)},
        std={"2m_temperature": 2.0, "geopotential": 4.0},
    )  # fmt: skip
    with st.trace() as t:
        found = data[1]
    assert not t.sent and len(data) == 3
    local = found["x"].to_local()
    assert data.denormalised(local).shape == local.shape
    latitude, longitude = data.coordinates()
    assert (len(latitude), len(longitude)) == local.shape[1:]
    mine = (latitude, longitude, data.area_weights(), data.bytes_read)
    return {k: v.full_tensor() for k, v in found.items()}, data.channels, data.times, mine


@pytest.mark.parametrize("order", [("latitude", "longitude"), ("longitude", "latitude")])
@pytest.mark.parametrize(
    "mesh, placements, sizes",
    [
        ((1,), [Shard(1)], None),
        ((2,), [Shard(1)], {1: (2, 7)}),
        ((2, 2), [Shard(1), Shard(2)], None),
        ((3,), [Shard(2)], {2: (12, 0, 0)}),
    ],
)
def test_samples(tmp_path, order, mesh, placements, sizes):
    url = str(tmp_path / "era5.zarr")
    data = make(url, order)
    levels = [850, 50]
    n = int(np.prod(mesh))
    mean = torch.tensor([280.0, 1, 1]).view(3, 1, 1)
    std = torch.tensor([2.0, 4, 4]).view(3, 1, 1)
    for found, channels, times, mine in st.simulate(
        n, sample, url, mesh, placements, sizes, levels
    ):
        for key, time in (("x", 1), ("y", 3)):
            want = (expected(data, time, levels) - mean) / std
            torch.testing.assert_close(found[key], want, rtol=1e-6, atol=1e-5)
        assert channels == ["2m_temperature", "geopotential@850", "geopotential@50"]
        assert (times == TIMES.astype("datetime64[s]")).all()
        assert set(mine[0].tolist()) <= set(data.latitude.values.tolist())


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("version", [2, 3])
def test_coordinates_weights_and_statistics_from_files(tmp_path, descending, version):
    url = str(tmp_path / "era5.zarr")
    data = make(url, descending=descending, version=version)
    names = ["2m_temperature", "geopotential"]
    data[names].mean(["time", "latitude", "longitude"]).to_netcdf(tmp_path / "mean.nc")
    data[names].std(["time", "latitude", "longitude"]).to_netcdf(tmp_path / "std.nc")

    def run():
        weather = io.LatLon(
            url, names, T.make_mesh((2,)), [Shard(1)], levels=[500],
            mean=str(tmp_path / "mean.nc"), std=str(tmp_path / "std.nc"), lead=0,
        )  # fmt: skip
        states = torch.stack([weather[i]["x"].full_tensor() for i in range(len(weather))])
        return states, weather.coordinates()[0], weather.area_weights()

    found = st.simulate(2, run)
    states = found[0][0]
    assert states.shape == (5, 2, 9, 12)
    torch.testing.assert_close(states.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        states.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-4, rtol=0
    )
    assert torch.cat([f[1] for f in found]).tolist() == data.latitude.values.tolist()
    # the area between the borders of the equator's row of cells and of a pole's, by hand
    weights = found[0][2]
    row = np.deg2rad(180 / 8)
    areas = torch.tensor([1 - np.sin(np.pi / 2 - row / 2), 2 * np.sin(row / 2)])
    torch.testing.assert_close(
        weights[[0, 4]] / weights.sum(), (areas / 2).float(), rtol=1e-5, atol=0
    )
    assert weights.mean() == pytest.approx(1)


def test_refusals(tmp_path):
    url = str(tmp_path / "era5.zarr")
    make(url)

    def run():
        mesh = T.make_mesh((1,))
        for names, places, more, text in [
            (["wind"], [Shard(1)], {}, "'wind'; there are 2m_temperature"),
            (["land_sea_mask"], [Shard(1)], {}, "expected time"),
            (["geopotential"], [Shard(1)], dict(levels=[7]), "no levels"),
            (["geopotential"], [Shard(0)], {}, "latitude and longitude"),
            (["geopotential"], [Shard(1)], dict(mean={"geopotential": [1, 2]}), "2 statistics"),
            (["2m_temperature"], [Shard(1)], dict(std={"2m_temperature": 0}), "std .* constant"),
        ]:
            with pytest.raises(ValueError, match=text):
                io.LatLon(url, names, mesh, places, **more)
        with pytest.raises(IndexError, match="sample 4 of 4"):
            io.LatLon(url, ["2m_temperature"], mesh, [Shard(1)])[4]

    st.simulate(1, run)


@pytest.mark.parametrize("lazy", [True, False])
def test_datasets_of_xarray(tmp_path, lazy):
    """Opened lazily or in memory, times decoded or not, and a part of it."""
    url = str(tmp_path / "era5.zarr")
    made = make(url)

    def run(data, times):
        weather = io.LatLon(data, ["2m_temperature", "geopotential"], T.make_mesh((2,)), [Shard(1)])
        assert (weather.times == times.astype("datetime64[s]")).all()
        return weather[0]["x"].full_tensor()

    for decode in (True, False):
        data = xr.open_zarr(url, decode_times=decode, chunks=None) if lazy else made
        found = st.simulate(2, run, data, TIMES)[0]
        torch.testing.assert_close(found, expected(made, 0, LEVELS))
        found = st.simulate(2, run, data.isel(time=slice(2, None)), TIMES[2:])[0]
        torch.testing.assert_close(found, expected(made, 2, LEVELS))


@pytest.mark.parametrize(
    "units, calendar",
    [
        ("hours since 1900-01-01 00:00:00.0", "gregorian"),
        ("days since 1800-1-1 6:30", None),
        ("Hours since 1970-01-01T12:00:00Z", "standard"),
        ("seconds since 1950-01-01 00:00:30 UTC", "proleptic_gregorian"),
        ("days since 0001-01-01", "proleptic_gregorian"),
        ("minutes since 2000-02-28 +00:00", None),
    ],
)
@pytest.mark.parametrize("dtype", ["i4", "f8"])
def test_times_are_those_of_xarray(units, calendar, dtype):
    """Hours since 1900 in 32 bits, as reanalyses have them, are more seconds than 32 bits hold."""
    attrs = {"units": units} | ({"calendar": calendar} if calendar else {})
    raw = xr.Dataset({"time": ("time", np.array([0, 31, 72000]).astype(dtype), attrs)})
    if dtype == "f8":
        raw["time"] = raw["time"].copy(data=np.array([0, 31.25, 72000.5]))
    found = decoded_times(io.open_array(raw, "time"))
    wanted = xr.decode_cf(raw)["time"].values
    assert (found == wanted.astype("datetime64[s]")).all()


def test_decoded_times_are_rounded():
    """Hours as days of 32 bits are a little less than they are."""
    days = np.arange(48, dtype=np.float32) / np.float32(24)
    raw = xr.Dataset({"time": ("time", days, {"units": "days since 2000-01-01"})})
    wanted = np.datetime64("2000-01-01", "s") + np.arange(48) * np.timedelta64(3600, "s")
    for data in (raw, xr.decode_cf(raw)):
        assert (decoded_times(io.open_array(data, "time")) == wanted).all()


@pytest.mark.parametrize(
    "units, calendar, text",
    [
        ("hours since 1959-01-01", "noleap", "calendar 'noleap'"),
        ("days since 0001-01-01", None, "calendar 'standard'"),
        ("hours since 1959-01-01 00:00 +02:00", None, "expected 'hours since"),
        ("hours since 1959-13-01", None, "units 'hours since 1959-13-01'"),
        ("months since 1959-01-01", None, "expected 'hours since"),
    ],
)
def test_times_that_are_refused(units, calendar, text):
    attrs = {"units": units} | ({"calendar": calendar} if calendar else {})
    raw = xr.Dataset({"time": ("time", np.arange(3.0), attrs)})
    with pytest.raises(ValueError, match=text):
        decoded_times(io.open_array(raw, "time"))
    raw["time"] = ("time", np.array([0, np.nan]), {"units": "days since 2000-01-01"})
    with pytest.raises(ValueError, match="times are missing"):
        decoded_times(io.open_array(raw, "time"))


def test_samples_are_cut_anew_within_an_epoch(tmp_path):
    """What a loader has read ahead in the old cut is read again."""
    make(tmp_path / "era5.zarr")

    def on_rank():
        mesh = T.make_mesh((3,))
        weather = io.LatLon(tmp_path / "era5.zarr", ["geopotential"], mesh, [Shard(1)])
        want = [s["x"].full_tensor() for s in (weather[i] for i in range(len(weather)))]
        loader = io.Loader(weather, mesh, sampler=io.DomainSampler(4, mesh, shuffle=False))
        balancer = st.balance.Balancer(9, mesh, speeds=[4, 1, 4])
        found = []
        for batch in loader:
            found.append(batch["x"])
            if len(found) == 2:
                weather.recut({1: balancer.sizes})
                break
        found += [batch["x"] for batch in loader]
        assert [x.spec.sizes[2] for x in found] == [(3, 3, 3)] * 2 + [(4, 1, 4)] * 2
        assert all(torch.equal(x.full_tensor()[0], w) for x, w in zip(found, want, strict=True))
        assert weather.coordinates()[0].shape == (balancer.sizes[mesh.get_local_rank()],)

    st.simulate(3, on_rank)

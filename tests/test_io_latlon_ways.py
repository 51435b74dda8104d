"""LatLon's other ways: names of dims, static fields, forcings, history, leads, times, NaN, statistics."""

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import io
from shardtensor import testing as T

pytest.importorskip("zarr")
xr = pytest.importorskip("xarray")

TIMES = np.datetime64("2020-01-01T00", "ns") + 6 * np.arange(8) * np.timedelta64(1, "h")


def made(lat="lat", lon="lon", level="pressure_level", time="time"):
    rng = np.random.default_rng(1)
    sizes = {time: 8, level: 2, lat: 6, lon: 8}

    def field(*dims):
        return dims, rng.normal(3, 2, [sizes[d] for d in dims])

    data = xr.Dataset(
        {"t": field(time, level, lat, lon), "sst": field(time, lat, lon),
         "sun": field(time, lat, lon), "mask": field(lat, lon)},
        {time: TIMES, level: [500, 850], lat: np.linspace(75, -75, 6), lon: np.arange(8) * 45.0},
    )  # fmt: skip
    data["sst"][:, :2, 3] = np.nan
    return data


def state(data, i):
    return torch.from_numpy(
        np.concatenate([data["t"].values[i], data["sst"].values[i][None]])
    ).float()


def forced(data, i):
    return torch.from_numpy(np.stack([data["sun"].values[i], data["mask"].values])).float()


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("names", [{}, {"lat": "latitude", "level": "level", "time": "valid_time"}])
def test_history_forcings_leads_and_times(names, selected):
    data = made(**names)
    time, lat = names.get("time", "time"), names.get("lat", "lat")
    if selected:
        data = data.isel({time: slice(1, None), "lon": slice(0, 6)}).sel({lat: slice(75, -45)})
    steps = [0, 1, 3, 4, 6] if selected else slice(0, None, 2)
    picked = np.arange(data.sizes[time])[steps]

    def run():
        weather = io.LatLon(
            data, ["t", "sst"], T.make_mesh((2,)), [Shard(1)], history=2, lead=[0, 1],
            forcings=["sun", "mask"], times=steps, fill=0.0, mean={"t": [1.0, 2.0], "sst": 3.0},
        )  # fmt: skip
        sample = weather[1]
        y = [v.full_tensor() for v in sample["y"]]
        return sample["x"].full_tensor(), y, len(weather), weather.channels, weather.times

    mean = torch.tensor([1.0, 2, 3]).view(3, 1, 1)
    past, now, later = ((state(data, picked[k]) - mean).nan_to_num(0.0) for k in (1, 2, 3))
    for x, y, n, channels, times in st.simulate(2, run):
        torch.testing.assert_close(x, torch.cat([past, now, forced(data, picked[2])]))
        torch.testing.assert_close(y[0], now)
        torch.testing.assert_close(y[1], later)
        assert n == len(picked) - 2 and channels == ["t@500", "t@850", "sst"]
        assert (times == data[time].values[picked].astype("datetime64[s]")).all()


def test_statistics_that_one_rank_cannot_read(tmp_path):
    made().to_zarr(tmp_path / "store.zarr")

    def run():
        mesh = T.make_mesh((2,))
        weather = io.LatLon(str(tmp_path / "store.zarr"), ["t"], mesh, [Shard(1)])
        if mesh.get_rank():
            weather._block = lambda *_: 1 / 0
        with pytest.raises((RuntimeError, ZeroDivisionError)) as e:
            weather.statistics()
        return e.type

    assert st.simulate(2, run) == [RuntimeError, ZeroDivisionError]


def test_statistics_of_all_ranks(tmp_path):
    data = made()
    data.to_zarr(tmp_path / "store.zarr")

    def run():
        mesh = T.make_mesh((2, 2))
        where = str(tmp_path / "store.zarr")
        weather = io.LatLon(
            where, ["t", "sst"], mesh, [Shard(1), Shard(2)], sizes={1: [1, 5]}, forcings=["sun"]
        )
        mean, std = weather.statistics()
        again = io.LatLon(where, ["t", "sst"], mesh, [Shard(1), Shard(2)], mean=mean, std=std)
        few = weather.statistics(["sun"], times=[0, 3])[0]["sun"]
        return mean, std, few, again[0]["x"].full_tensor(), weather.area_weights()

    for mean, std, few, x, weights in st.simulate(4, run):
        w = xr.DataArray(weights.double().numpy(), dims="lat")
        for name, levels in (("t", 2), ("sst", 1)):
            found = data[name].weighted(w)
            over = ["time", "lat", "lon"]
            assert np.allclose(mean[name], np.atleast_1d(found.mean(over).values), rtol=1e-6)
            assert np.allclose(std[name], np.atleast_1d(found.std(over).values), rtol=1e-6)
            assert len(mean[name]) == levels
        want = data["sun"].isel(time=[0, 3]).weighted(w).mean()
        assert np.allclose(few, float(want), rtol=1e-6)
        m = torch.tensor(mean["t"] + mean["sst"]).view(3, 1, 1)
        s = torch.tensor(std["t"] + std["sst"]).view(3, 1, 1)
        torch.testing.assert_close(
            x, (state(data, 0) - m) / s, equal_nan=True, rtol=1e-5, atol=1e-5
        )


def test_what_does_not_fit_is_told():
    data = made()

    def run():
        mesh = T.make_mesh((2,))
        with pytest.raises(ValueError, match="without time only among forcings"):
            io.LatLon(data, ["mask"], mesh, [Shard(1)])
        with pytest.raises(ValueError, match="history 0"):
            io.LatLon(data, ["t"], mesh, [Shard(1)], history=0)
        with pytest.raises(IndexError, match="sample 6 of 6"):
            io.LatLon(data, ["t"], mesh, [Shard(1)], history=2)[6]
        for variables, options, told in [
            ([], {}, "LatLon of no variables"),
            (["t"], {"levels": []}, "t: no levels at all"),
            (["t", "sst"], {"mean": {"t": 1}}, "mean and std of sst are missing"),
        ]:
            with pytest.raises(ValueError, match=told):
                io.LatLon(data, variables, mesh, [Shard(1)], **options)
        with pytest.raises(ValueError, match=r"time: a coordinate of shape \(\) is none of a dim"):
            io.LatLon(data.isel(time=0), ["t"], mesh, [Shard(1)])

    st.simulate(2, run)


def test_one_variable_and_leads_of_numpy():
    """A DataArray has its coordinates; any integer is a number of steps."""
    data = made()

    def run():
        one = io.LatLon(data["sst"], ["sst"], T.make_mesh((2,)), [Shard(1)], lead=np.int64(2))
        with pytest.raises(ValueError, match="variable 't'; there are lat, lon, time"):
            io.LatLon(data["sst"], ["t"], T.make_mesh((2,)), [Shard(1)])
        mean = one.statistics(times=slice(2, None))[0]["sst"]
        return one[1]["y"].full_tensor(), one.times, mean

    y, times, mean = st.simulate(2, run)[0]
    assert torch.equal(y.nan_to_num(), state(data, 3)[-1:].nan_to_num())
    assert (times == TIMES.astype("datetime64[s]")).all() and np.isfinite(mean).all()
    for array in (np.zeros(3), data["sst"].drop_vars(["time", "lat", "lon"])):
        with pytest.raises(ValueError, match="variable 'u'"):
            io.open_array(array, "u")


@pytest.mark.parametrize("rows", [slice(None), slice(0, 3), slice(2, 4), slice(0, 1)])
def test_areas_of_a_region_are_those_of_the_globe(rows):
    """Rows as far apart everywhere; those at its borders are no larger than others."""
    data = made()

    def run():
        every, few = (
            io.LatLon(d, ["t"], T.make_mesh((2,)), [Shard(2)]).area_weights()
            for d in (data, data.isel(lat=rows))
        )
        return every[rows], few

    every, few = st.simulate(2, run)[0]
    torch.testing.assert_close(few, every / every.mean())


def test_one_name_is_no_list_of_names(tmp_path):
    """Its letters would be."""

    def run():
        mesh, given = T.make_mesh((2,)), [Shard(1)]
        for make, told in [
            (lambda: io.LatLon(made(), "sst", mesh, given), "variables 'sst': give a list"),
            (lambda: io.LatLon(made(), ["t"], mesh, given, forcings="sun"), "forcings 'sun'"),
            (lambda: io.LatLon(made(), ["t"], mesh, given).statistics("t"), "names 't'"),
            (lambda: io.Points(tmp_path, mesh), "folders '/"),
            (lambda: io.Points([], mesh), "Points of no folders"),
            (lambda: io.Points([tmp_path], mesh, most=0), "most 0: 1 row or more"),
        ]:
            with pytest.raises(ValueError, match=told):
                make()

    st.simulate(2, run)

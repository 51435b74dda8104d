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

    st.simulate(2, run)

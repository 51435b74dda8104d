"""The forecast from data to pictures: scores against their definitions, and runs on 1 and 4 ranks."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import torchrun
from torch.distributed.tensor import Replicate, Shard

from shardtensor import testing as T

EXAMPLES = Path(__file__).parent.parent / "examples"
pytest.importorskip("zarr")
import scores  # noqa: E402

AREA = torch.tensor([0.4, 1.5, 1.7, 1.0, 0.4], dtype=torch.float64)


def fields(*shape):
    torch.manual_seed(len(shape))
    return torch.randn(*shape, 5, 6, dtype=torch.float64)


def weighted(x):
    """By loops."""
    found = 0.0
    for i in range(5):
        for j in range(6):
            found += float(AREA[i]) * float(x[i, j])
    return found / 30


def test_scores_are_their_definitions():
    x, y, climate = fields(3, 2), fields(3, 2).flip(0), fields(2)
    for c in range(2):
        squares = [weighted((x[b, c] - y[b, c]) ** 2) for b in range(3)]
        assert float(scores.rmse(x, y, AREA)[c]) == pytest.approx(math.sqrt(sum(squares) / 3))
        found = 0.0
        for b in range(3):
            p, q = x[b, c] - climate[c], y[b, c] - climate[c]
            found += weighted(p * q) / math.sqrt(weighted(p * p) * weighted(q * q)) / 3
        assert float(scores.acc(x, y, climate, AREA)[c]) == pytest.approx(found)
        members, truth, m = x[:, c], y[0, c], 3
        skill = sum(weighted((members[i] - truth).abs()) for i in range(m)) / m
        pairs = sum(weighted((p - q).abs()) for p in members for q in members)
        assert float(scores.crps(x, y[0], AREA)[c]) == pytest.approx(
            skill - pairs / (2 * m * (m - 1))
        )
        # Parseval: the power of all wavenumbers is the mean square
        power = scores.spectrum(x, AREA)[c]
        assert float(power.sum()) == pytest.approx(
            sum(weighted(x[b, c] ** 2) for b in range(3)) / 3
        )


@pytest.mark.parametrize("sizes", [(3, 2), (5, 0), (1, 1, 3), (2, 0, 1, 2)])
def test_scores_of_shards_are_those_of_whole_fields(sizes):
    """Sharded by latitude, uneven and empty; members over another axis of the mesh."""
    n = len(sizes)
    x, y, climate = fields(3, 2), fields(3, 2).flip(0), fields(2)
    lat, area = T.shard(2, sizes), None
    T.hold(scores.rmse, [x, y, AREA], [lat, lat, area], (n,))
    T.hold(scores.acc, [x, y, climate, AREA], [lat, lat, T.shard(1, sizes), area], (n,))
    T.hold(scores.spectrum, [x, AREA], [lat, area], (n,))
    members, truth = T.On([Shard(3), Shard(2)]), T.On([Shard(2), Shard(1)])
    T.hold(scores.crps, [x, y[0], AREA], [members, truth, None], (2, 2))
    over = T.On([Shard(0), Shard(2)]), T.On([Replicate(), Shard(1)])
    T.hold(scores.crps, [x, y[0], AREA], [*over, None], (2, 2))


@pytest.mark.gloo
def test_from_data_to_pictures_on_any_number_of_ranks(tmp_path):
    xr = pytest.importorskip("xarray")
    pytest.importorskip("matplotlib")
    toy = {"times": 20, "steps": 6, "members": 4, "roll": 3, "width": 6, "double": None}
    toy = [f"--{k}" if v is None else f"--{k}={v}" for k, v in toy.items()]
    toy += ["--shape", "13", "16"]
    found = {}
    for ranks, data in ((1, 1), (4, 2)):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        code, out = torchrun(folder, ranks, EXAMPLES / "forecast.py", folder, *toy, "--data", data)
        assert code == 0, out[-3000:]
        found[ranks] = json.loads((folder / "scores.json").read_text())
        assert (folder / "forecast.png").stat().st_size > 10_000
    one, four = found[1], found[4]
    assert one["losses"][-1] < 0.6 * one["losses"][0]
    for key in ("losses", "rmse", "acc", "spectrum", "persistence"):
        np.testing.assert_allclose(four[key], one[key], rtol=1e-9)
    for a, b in zip(four["forecast"], one["forecast"], strict=True):
        np.testing.assert_allclose(a["crps"], b["crps"], rtol=1e-9)
        np.testing.assert_allclose(a["rmse_of_mean"], b["rmse_of_mean"], rtol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stores = [xr.open_zarr(tmp_path / n / "forecast.zarr").load() for n in ("1", "4")]
    name = "2m_temperature"
    assert stores[0][name].dims == ("time", "number", "latitude", "longitude")
    assert stores[0][name].shape == (3, 4, 13, 16) and stores[0][name].attrs["units"] == "K"
    np.testing.assert_allclose(stores[0][name], stores[1][name], rtol=1e-6)
    # the last quarter of 20 times begins after 15 of them
    first = np.datetime64("2020-01-01") + np.timedelta64(6 * 16, "h")
    np.testing.assert_array_equal(
        stores[1]["time"], first + np.arange(3) * np.timedelta64(6, "h").astype("timedelta64[ns]")
    )

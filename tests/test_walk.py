"""The script of docs/walk.md: on two ranks, stopped and resumed, what it is on one."""

import sys
from pathlib import Path

import pytest

from shardtensor.ranks.testing import run_workers

xr = pytest.importorskip("xarray")
pytest.importorskip("zarr")

EXAMPLES = str(Path(__file__).parent.parent / "examples")


def run(folder, name, stops):
    sys.path.insert(0, EXAMPLES)
    import walk

    return [walk.train(folder, steps=n, name=name, roll=2, double=True) for n in stops][-1]


@pytest.mark.slow
def test_two_ranks_resumed_are_one_device(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import walk

    walk.make(tmp_path / "data.zarr", steps=24, shape=(17, 16))
    (one,) = run_workers(1, run, str(tmp_path), "one", (3,))
    two = run_workers(2, run, str(tmp_path), "two", (1, 3))
    assert len(one["loss"]) == 3 and one["loss"][-1] < one["loss"][0]
    for other in two:
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-9)
        assert other["rmse"] == pytest.approx(one["rmse"], rel=1e-9)
    a, b = (xr.open_zarr(tmp_path / n / "forecast.zarr") for n in ("one", "two"))
    assert dict(a.sizes) == {"time": 2, "latitude": 17, "longitude": 16}
    assert float(abs(a - b).max().to_array().max()) < 1e-9 and (a.time == b.time).all()

"""The recipe of vehicle aerodynamics: sharded training is one device's, on files of all layouts."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import vehicle_aero
from panels import Body, Flow, generate
from transolver import Transolver
from vehicle_aero import Setting, prepared, sign_flips, train

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ranks.testing import run_workers

pv = pytest.importorskip("pyvista")


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    root = tmp_path_factory.mktemp("bodies")
    generate(root, 4, 1, 50)
    return root


def setting(root, **more):
    options = dict(steps=4, every=2, tested=1, double=True) | more
    return Setting(prepared(root, "drivaerml"), **options)


def on_ranks(given, task, shares):
    mesh = T.make_mesh((dist.get_world_size(),))
    with st.fallback("error"):
        return train(given, task, 0, mesh, shares)


@pytest.mark.gloo
@pytest.mark.parametrize("task", vehicle_aero.TASKS)
@pytest.mark.parametrize("shares", [[2, 1], [3, 0, 1]])
def test_trains_as_one_device(bodies, task, shares):
    given = setting(bodies)
    (want,) = run_workers(1, vehicle_aero.alone, given, task, 0)
    assert len(want[0]) == 4 and len(want[1]) == 3 and want[0][0] != want[0][-1]
    for got in run_workers(len(shares), on_ranks, given, task, shares):
        np.testing.assert_allclose(got[0], want[0], rtol=1e-9)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-9)


@pytest.mark.parametrize("c_geometry", [0, 4])
def test_models_on_shards(c_geometry):
    torch.manual_seed(0)
    model = Transolver(3, 2, c_geometry, width=16, depth=2, slices=5).double()
    x, y = torch.randn(1, 11, 3, dtype=torch.float64), torch.randn(1, 7, 4, dtype=torch.float64)
    given = [x, y] if c_geometry else [x]
    for cut, other in (((7, 4), (1, 6)), ((5, 0, 6), (0, 7, 0))):
        places = [T.shard(1, cut), T.shard(1, other)][: len(given)]
        T.hold(model, given, places, (len(cut),), rtol=1e-10)


def read_rows(given):
    data = vehicle_aero.Clouds(given, "surface", T.make_mesh((2,)), [3, 1])
    before = data.surface.bytes_read
    _, _, field = data[0]
    return data.surface.bytes_read - before, field.spec.dims[1].sizes


@pytest.mark.gloo
def test_a_rank_reads_its_rows(bodies):
    (first, sizes), (second, _) = run_workers(2, read_rows, setting(bodies))
    assert sizes == (60, 20) and first == 3 * second


def shapenet(root, i):
    """Fields on points; surface of quads, volume of hexahedra."""
    folder = root / "param0" / f"case{i}"
    folder.mkdir(parents=True)
    quads = pv.Box(level=2, quads=True).cast_to_unstructured_grid()
    quads.point_data["point_scalars"] = np.arange(quads.n_points, dtype=np.float32) * (i + 1)
    quads.save(folder / "quadpress_smpl.vtk")
    hexes = pv.ImageData(dimensions=(3, 3, 3)).cast_to_unstructured_grid()
    hexes.point_data["point_vectors"] = np.random.default_rng(i).normal(size=(hexes.n_points, 3))
    hexes.save(folder / "hexvelo_smpl.vtk")


def airfrans(root, i):
    folder = root / f"airFoil2D_{i}"
    folder.mkdir(parents=True)
    for end, grid in (
        ("aerofoil.vtp", pv.Sphere(theta_resolution=6, phi_resolution=6)),
        ("internal.vtu", pv.Plane(i_resolution=5, j_resolution=4).cast_to_unstructured_grid()),
    ):
        grid.clear_data()
        grid.point_data["U"] = np.random.default_rng(i).normal(size=(grid.n_points, 3))
        grid.point_data["p"] = np.random.default_rng(i).normal(size=grid.n_points)
        grid.save(folder / f"{folder.name}_{end}")


@pytest.mark.gloo
@pytest.mark.parametrize("layout, make", [("shapenet-car", shapenet), ("airfrans", airfrans)])
def test_other_layouts(tmp_path, layout, make):
    for i in range(3):
        make(tmp_path, i)
    given = Setting(prepared(tmp_path, layout), 2, 1, 1, double=True)
    for task in vehicle_aero.TASKS:
        (want,) = run_workers(1, vehicle_aero.alone, given, task, 0)
        for got in run_workers(2, on_ranks, given, task, [2, 1]):
            np.testing.assert_allclose(got[0], want[0], rtol=1e-9)


def test_sign_flips():
    assert sign_flips([1.0, 1.0, 1.0]) == 0.25
    assert sign_flips([1.0, -1.0]) == 1.0
    assert sign_flips([0.0, 0.0]) == 1.0
    assert sign_flips([1.0, 2.0, -0.1]) == 0.5


@pytest.mark.slow
def test_the_program(tmp_path, monkeypatch, bodies):
    shutil.copytree(bodies, tmp_path / "vehicles1")
    args = ["--bodies", "4", "--level", "1", "--steps", "10", "--tested", "1", "--seeds", "2",
            "--out", str(tmp_path)]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["vehicle_aero.py", *args])
    threads = torch.get_num_threads()
    try:
        vehicle_aero.main()
    finally:
        torch.set_num_threads(threads)
    rows = list(csv.DictReader((tmp_path / "vehicle_aero.csv").open()))
    found = {}
    for r in rows:
        found.setdefault((r["task"], r["seed"], r["step"]), {})[r["on"]] = float(r["error"])
    assert len(found) == 2 * 2 * 11
    assert all(abs(v["sharded"] / v["one device"] - 1) < 1e-4 for v in found.values())
    assert (tmp_path / "vehicle_aero.png").stat().st_size > 10_000


def test_nothing_of_ours_in_the_model():
    import panels
    import transolver

    for module in (panels, transolver):
        assert "import shardtensor" not in Path(module.__file__).read_text()
    assert Flow(*Body().surface(1)).cp.max() <= 1

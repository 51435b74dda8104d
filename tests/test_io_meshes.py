"""Meshes in published layouts, converted once, read by rows."""

import json

import numpy as np
import pytest
import torch

import shardtensor as st
from shardtensor import testing as T
from shardtensor.io import Points, cases, convert, read_mesh

pv = pytest.importorskip("pyvista")


def sphere():
    return pv.Sphere(theta_resolution=12, phi_resolution=10)


def box():
    return pv.ImageData(dimensions=(4, 3, 3), spacing=(1.0, 0.5, 2.0)).cast_to_unstructured_grid()


def drivaerml(root, runs=(1, 2, 10)):
    """run_i/{drivaer_i.stl, boundary_i.vtp, volume_i.vtu, geo_ref_i.csv, force_mom_i.csv}."""
    for i in runs:
        folder = root / f"run_{i}"
        folder.mkdir(parents=True)
        surface, volume = sphere(), box()
        sphere().save(folder / f"drivaer_{i}.stl")
        for name, width in [("CpMeanTrim", 1), ("pMeanTrim", 1), ("wallShearStressMeanTrim", 3)]:
            values = np.random.default_rng(i).normal(size=(surface.n_cells, width))
            surface.cell_data[name] = (values if width > 1 else values[:, 0]).astype(np.float32)
        surface.save(folder / f"boundary_{i}.vtp")
        volume.cell_data["UMeanTrim"] = np.random.default_rng(i).normal(size=(volume.n_cells, 3))
        volume.cell_data["pMeanTrim"] = np.arange(volume.n_cells, dtype=np.float32)
        volume.save(folder / f"volume_{i}.vtu")
        (folder / f"geo_ref_{i}.csv").write_text("aRef,lRef\n2.17,2.79\n")
        (folder / f"force_mom_{i}.csv").write_text("Cd,Cl\n0.3,0.1\n")


def airfrans(root):
    """<name>/<name>_{internal.vtu, freestream.vtp, aerofoil.vtp}, fields on points."""
    name = "airFoil2D_SST_43.597_5.932_3.551_3.1_1.0_18.252"
    folder = root / name
    folder.mkdir(parents=True)
    inside = pv.Plane(i_resolution=5, j_resolution=4).cast_to_unstructured_grid()
    inside.clear_data()
    for field, width in [("U", 3), ("p", 1), ("nut", 1), ("implicit_distance", 1)]:
        values = np.random.default_rng(1).normal(size=(inside.n_points, width))
        inside.point_data[field] = values if width > 1 else values[:, 0]
    inside.save(folder / f"{name}_internal.vtu")
    sphere().save(folder / f"{name}_freestream.vtp")
    sphere().save(folder / f"{name}_aerofoil.vtp")
    (root / "manifest.json").write_text(json.dumps({"full_train": [name]}))
    return inside


def shapenet_car(root):
    """param*/<hash>/{quadpress_smpl.vtk, hexvelo_smpl.vtk}: unstructured grids."""
    folder = root / "param0" / "1a0bc9ab92c915167ae33d942430658c"
    folder.mkdir(parents=True)
    quads = pv.Box(level=2, quads=True).cast_to_unstructured_grid()
    quads.point_data["point_scalars"] = np.arange(quads.n_points, dtype=np.float32)
    quads.save(folder / "quadpress_smpl.vtk")
    hexes = box()
    hexes.point_data["point_vectors"] = np.zeros((hexes.n_points, 3))
    hexes.save(folder / "hexvelo_smpl.vtk")
    np.save(folder / "press.npy", np.zeros(3))
    return quads


def write_obj(path, mesh):
    """Wavefront's text: a line a point, and a line a face of numbers that begin with 1."""
    lines = ["v {} {} {}".format(*p) for p in mesh.points]
    lines += ["f {} {} {}".format(*(f + 1)) for f in mesh.faces.reshape(-1, 4)[:, 1:]]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("kind", ["vtp", "vtk", "stl", "ply", "obj"])
def test_surfaces(tmp_path, kind):
    path = tmp_path / f"s.{kind}"
    write_obj(path, sphere()) if kind == "obj" else sphere().save(path)
    mesh = read_mesh(path)
    assert len(mesh.triangles) == len(mesh.centres) == sphere().n_cells
    # a polyhedron inscribed in the sphere of radius 1/2
    assert 0.9 * np.pi < mesh.sizes.sum() < np.pi
    corners = mesh.points[mesh.triangles]
    np.testing.assert_allclose(mesh.centres, corners.mean(1), atol=1e-6)
    outward = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    np.testing.assert_allclose(np.linalg.norm(outward, axis=1) / 2, mesh.sizes, rtol=1e-4)
    assert ((mesh.normals * mesh.centres).sum(1) > 0).all()
    # Gauss: the volume by its surface
    volume = ((mesh.normals * mesh.centres).sum(1) * mesh.sizes).sum() / 3
    assert 0.85 * np.pi / 6 < volume < np.pi / 6


def test_volumes(tmp_path):
    box().save(tmp_path / "v.vtu")
    mesh = read_mesh(tmp_path / "v.vtu")
    assert mesh.normals is None and mesh.triangles is None
    np.testing.assert_allclose(mesh.sizes, np.ones(12))
    assert mesh.centres.min(0).tolist() == [0.5, 0.25, 1.0]


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_mesh(tmp_path / "none.vtp")
    pv.PolyData(np.zeros((3, 3)), verts=np.empty(0, int)).save(tmp_path / "e.vtp")
    with pytest.raises(ValueError, match="without cells"):
        read_mesh(tmp_path / "e.vtp")


def test_published_layouts(tmp_path):
    drivaerml(tmp_path / "d")
    found = cases(tmp_path / "d", "drivaerml")
    assert [c["folder"].name for c in found] == ["run_1", "run_2", "run_10"]
    surface, volume = (read_mesh(found[0][k]) for k in ("surface", "volume"))
    assert set(surface.cell_fields) == {"CpMeanTrim", "pMeanTrim", "wallShearStressMeanTrim"}
    assert volume.cell_fields["UMeanTrim"].shape == (12, 3) and surface.normals is not None
    inside = airfrans(tmp_path / "a")
    (case,) = cases(tmp_path / "a", "airfrans")
    mesh = read_mesh(case["volume"])
    assert set(mesh.point_fields) == {"U", "p", "nut", "implicit_distance"}
    np.testing.assert_array_equal(mesh.points, inside.points)
    quads = shapenet_car(tmp_path / "s")
    (case,) = cases(tmp_path / "s", "shapenet-car")
    mesh = read_mesh(case["surface"])
    assert mesh.normals is not None and len(mesh.triangles) == 2 * quads.n_cells
    np.testing.assert_array_equal(mesh.point_fields["point_scalars"], np.arange(quads.n_points))
    assert read_mesh(case["volume"]).point_fields["point_vectors"].shape[1] == 3
    with pytest.raises(ValueError, match="no param"):
        cases(tmp_path / "d", "shapenet-car")
    with pytest.raises(ValueError, match="there are drivaerml"):
        cases(tmp_path / "d", "car")


def whole(folder, mesh, options):
    data = Points([folder], T.make_mesh(mesh), **options)
    with st.trace() as t:
        sample = data[0]
    assert not t.sent
    held = {k: len(v.to_local()) for k, v in sample.items()}
    assert len(set(held.values())) == 1
    return {k: v.full_tensor() for k, v in sample.items()}, held["coordinates"], data.bytes_read


@pytest.mark.parametrize(
    "mesh, options, rows",
    [
        ((1,), {}, None),
        ((2,), {}, None),
        ((3,), dict(shares=[1, 0, 2]), None),
        ((4,), dict(most=50), None),
        ((2, 2), dict(axes=[1]), None),
    ],
)
def test_each_rank_reads_its_rows(tmp_path, mesh, options, rows):
    drivaerml(tmp_path, (1,))
    (case,) = cases(tmp_path, "drivaerml")
    folder = convert(case["surface"], tmp_path / "points", rename={"CpMeanTrim": "pressure"})
    assert convert("not read again", folder) == folder
    stored = read_mesh(case["surface"])
    n = len(stored.centres)
    found = st.simulate(int(np.prod(mesh)), whole, folder, mesh, options)
    sample = found[0][0]
    assert set(sample) == {
        "coordinates", "sizes", "normals", "pressure", "pMeanTrim", "wallShearStressMeanTrim"
    }  # fmt: skip
    # the same cells in another order: every row is where its centre is
    row = {tuple(c): i for i, c in enumerate(stored.centres.astype(np.float32).tolist())}
    order = [row[tuple(c)] for c in sample["coordinates"].tolist()]
    assert len(set(order)) == len(order) == options.get("most", n)
    np.testing.assert_array_equal(sample["pressure"], stored.cell_fields["CpMeanTrim"][order])
    np.testing.assert_array_equal(sample["normals"], stored.normals[order])
    for _, held, nbytes in found:
        assert nbytes == held * 4 * (3 + 1 + 3 + 1 + 1 + 3)
    held = [h for _, h, _ in found]
    if options.get("shares"):
        assert held[1] == 0 and abs(held[2] - 2 * held[0]) <= 2
    # along a curve: neighbours in the file are neighbours in space
    steps = np.linalg.norm(np.diff(sample["coordinates"].numpy(), axis=0), axis=1)
    if not options.get("most"):
        assert np.median(steps) < 0.25


def test_converts_points_and_refuses(tmp_path):
    inside = airfrans(tmp_path)
    (case,) = cases(tmp_path, "airfrans")
    folder = convert(case["volume"], tmp_path / "p", on="points", fields=["U", "p"])
    found, _, _ = st.simulate(2, whole, folder, (2,), dict(names=["coordinates", "U"]))[0]
    assert set(found) == {"coordinates", "U"} and found["U"].shape == (inside.n_points, 3)
    assert found["U"].dtype == torch.float32
    with pytest.raises(ValueError, match="no fields"):
        convert(case["volume"], tmp_path / "q", fields=["U"])
    with pytest.raises(ValueError, match="on is"):
        convert(case["volume"], tmp_path / "q", on="edges")
    assert not (tmp_path / "q").exists()

    def refused():
        with pytest.raises(ValueError, match="no arrays"):
            Points([folder], T.make_mesh((1,)), names=["T"])

    st.simulate(1, refused)


def test_integers_that_float32_does_not_hold(tmp_path):
    surface = sphere()
    numbers = np.arange(surface.n_cells)
    surface.cell_data["id"], surface.cell_data["small"] = numbers + 2**24 + 1, numbers
    surface.cell_data["huge"] = numbers + 1e300
    surface.save(tmp_path / "s.vtp")
    folder = convert(tmp_path / "s.vtp", tmp_path / "p", fields=["id", "small"])
    found, _, _ = st.simulate(2, whole, folder, (2,), {})[0]
    assert found["small"].dtype == torch.float32 and not found["id"].is_floating_point()
    assert torch.equal(found["id"], found["small"].long() + 2**24 + 1)
    with pytest.raises(ValueError, match=r"huge: values to 1e\+300, more than float32 holds"):
        convert(tmp_path / "s.vtp", tmp_path / "q", fields=["huge"])

"""Meshes and clouds that were made to harm, or that broke: none leads elsewhere or is half read."""

import json
import os

import numpy as np
import pytest

import shardtensor as st
from shardtensor import testing as T
from shardtensor.io import Points, convert, read_mesh


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def sphere():
    pv = pytest.importorskip("pyvista")
    return pv.Sphere(theta_resolution=8, phi_resolution=8)


def test_names_that_are_paths(tmp_path):
    for name in (
        "../x",
        "a/b",
        "/tmp/x",
        "..",
        ".x",
        "",
        "a\\b",
        "coordinates",
        "sizes",
        "x" * 300,
    ):
        surface = sphere()
        surface.cell_data["p"] = np.ones(surface.n_cells)
        surface.save(tmp_path / "s.vtp")
        found = read_mesh(tmp_path / "s.vtp")
        found.cell_fields[name] = found.cell_fields.pop("p")
        with pytest.raises(ValueError, match="rename="):
            convert(found, tmp_path / "c", on="cells")
        with pytest.raises(ValueError, match="rename="):
            convert(tmp_path / "s.vtp", tmp_path / "c", fields=["p"], rename={"p": name})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["s.vtp"]
        found.cell_fields["text"] = np.array(["a"] * surface.n_cells)
        with pytest.raises(ValueError, match="'text' of <U1 cannot be stored"):
            convert(found, tmp_path / "c", fields=["text"])
        convert(found, tmp_path / "d", fields=[name], rename={name: "fine"})
        assert (tmp_path / "d" / "fine.npy").exists()
        for p in (tmp_path / "d").iterdir():
            p.unlink()
        (tmp_path / "d").rmdir()


def test_points_stay_in_their_folder(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    np.save(tmp_path / "secret.npy", np.ones((4, 3), np.float32))
    np.save(folder / "coordinates.npy", np.ones((4, 3), np.float32))
    good = {"on": "cells", "rows": 4, "arrays": ["coordinates"]}

    def read():
        return Points([folder], T.make_mesh((1,)))[0]

    def said(word):
        def run():
            with pytest.raises(ValueError) as caught:
                read()
            assert str(folder) in str(caught.value) and word in str(caught.value), caught.value

        st.simulate(1, run)

    for bad in (
        {"arrays": ["../secret"]}, {"arrays": [str(tmp_path / "secret")]}, {"arrays": [3]},
        {"arrays": None}, {"rows": -1}, {"rows": "4"}, {"rows": 2.5},
    ):  # fmt: skip
        (folder / "info.json").write_text(json.dumps({**good, **bad}))
        said("info.json")
    (folder / "info.json").write_text("{")
    said("info.json")
    (folder / "info.json").write_text(json.dumps(good))
    st.simulate(1, read)
    evil = np.array([Evil(tmp_path / "executed")] * 4)
    for values in (np.ones((3, 3)), np.ones(()), np.array(["a"] * 4), evil):
        np.save(folder / "coordinates.npy", values, allow_pickle=True)
        said("coordinates.npy")
    assert not (tmp_path / "executed").exists()


def test_broken_meshes(tmp_path):
    def broken(name, data, word=""):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            read_mesh(path)
        assert name in str(caught.value) and word in str(caught.value), caught.value

    for kind in ("vtp", "vtk", "ply"):
        path = tmp_path / f"s.{kind}"
        sphere().save(path)
        data = path.read_bytes()
        assert read_mesh(path).normals is not None
        broken(f"s.{kind}", b"")
        for n in (10, len(data) // 3, len(data) * 3 // 4, len(data) - 60):
            broken(f"s.{kind}", data[:n])
    surface = sphere()
    surface.points[5] = np.nan
    surface.save(tmp_path / "n.vtp")
    broken("n.vtp", (tmp_path / "n.vtp").read_bytes(), "not finite")
    text = "# vtk DataFile Version 3.0\nt\nASCII\nDATASET POLYDATA\nPOINTS 3 float\n0 0 0 1 0 0 0 1 0\n"
    broken("m.vtk", (text + "POLYGONS 1 4\n3 0 1 99\n").encode(), "points that are not there")
    broken("m.vtk", (text + "POLYGONS 1 4\n3 0 1 -1\n").encode(), "points that are not there")
    assert read_mesh_of(tmp_path / "g.vtk", text + "POLYGONS 1 4\n3 0 1 2\n").sizes.sum() == 0.5
    broken("e.obj", b"v 0 0 0\nv 1 0 0\nf 1 2 9\n")
    for name in ("x.pvd", "x.vtm", "x.pkl", "x"):
        broken(name, b"", "not one of .vtp")


def read_mesh_of(path, text):
    path.write_text(text)
    return read_mesh(path)

"""Data files that were made to harm, or that broke: none leads elsewhere, runs code or is half read."""

import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shardtensor.io import WellFile, open_array, write_well
from shardtensor.io.foreign import refuse_pickles

h5py = pytest.importorskip("h5py")
zarr = pytest.importorskip("zarr")
numcodecs = pytest.importorskip("numcodecs")

VALUES = np.arange(12, dtype=np.float32).reshape(4, 3)


def refused(where, variable=None, word=""):
    """Opening or reading raises one ValueError that names the file."""
    with pytest.raises(ValueError) as caught:
        source = open_array(where, variable)
        source.read([(0, n) for n in source.shape])
    said = str(caught.value)
    assert os.path.basename(str(where)) in said and word in said, said
    return said


# HDF5 ---------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path):
    """Files beside that of the stranger."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "raw").write_bytes(VALUES.tobytes())
    with h5py.File(folder / "s.h5", "w") as f:
        f["x"] = VALUES
        f["g/x"] = VALUES
    return folder


def external(f, secret):
    f.create_dataset("x", (4, 3), "f4", external=[(str(secret / "raw"), 0, 48)])


def virtual(f, secret):
    layout = h5py.VirtualLayout((4, 3), "f4")
    layout[:] = h5py.VirtualSource(str(secret / "s.h5"), "x", (4, 3))
    f.create_virtual_dataset("x", layout)


def link(f, secret):
    f["x"] = h5py.ExternalLink(str(secret / "s.h5"), "x")


def group(f, secret):
    f["x"] = h5py.ExternalLink(str(secret / "s.h5"), "g")


def soft(f, secret):
    f["out"] = h5py.ExternalLink(str(secret / "s.h5"), "g")
    f["x"] = h5py.SoftLink("/out/x")


def soft_of_soft(f, secret):
    soft(f, secret)
    f["g/y"] = h5py.SoftLink("/x")
    del f["x"]
    f["x"] = h5py.SoftLink("g/./y")
    f["g/more/x"] = h5py.SoftLink("../x")
    f["x2"] = h5py.SoftLink("out/x")
    del f["g/y"]
    f["g/y"] = h5py.SoftLink("/x2")


def circle(f, secret):
    f["x"] = h5py.SoftLink("/y")
    f["y"] = h5py.SoftLink("/x")


OUTSIDE = {
    "external": (external, "x", "external storage"), "virtual": (virtual, "x", "virtual dataset"),
    "link": (link, "/x", "link to another file"), "group": (group, "x/x", "link to another file"),
    "soft": (soft, "/x", "link to another file"), "soft twice": (soft_of_soft, "/x", "link to another"),
    "circle": (circle, "/x", "circle"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_hdf5_leads_nowhere(tmp_path, secret, name):
    make, variable, word = OUTSIDE[name]
    path = tmp_path / "stranger.h5"
    with h5py.File(path, "w") as f:
        make(f, secret)
        f["own"] = VALUES
        f["g/own"] = h5py.SoftLink("/own")
    # other arrays of the file, and links within it
    assert (open_array(path, "/own").read([(0, 4), (0, 3)]) == VALUES).all()
    assert (open_array(path, "g/own").read([(0, 4), (0, 3)]) == VALUES).all()
    with h5py.File(path, "r") as f:
        names = {k: f.get(k, getlink=True) for k in f}
    if not isinstance(names["x"], h5py.HardLink):
        # a name that is not listed is looked up as a path only
        variable = f"./{variable.strip('/')}"
    refused(path, variable, word)
    with h5py.File(path, "r") as f:
        if name in ("external", "virtual"):
            # who opened it trusts it
            source = open_array(f["x"])
            assert (source.read([(0, 4), (0, 3)]) == VALUES).all() and source.origin is None


@pytest.mark.parametrize("name", [n for n in OUTSIDE if n != "circle"])
def test_the_well_leads_nowhere(tmp_path, secret, name):
    path = tmp_path / "stranger.hdf5"
    write_well(path, {"p": torch.ones(1, 2, 4, 3)}, name="w", times=[0, 1])
    WellFile(path).close()
    with h5py.File(path, "r+") as f:
        OUTSIDE[name][0](f.create_group("more"), secret)
    with pytest.raises(ValueError, match=r"stranger\.hdf5: .*(other files|another file)"):
        WellFile(path)


def test_broken_hdf5(tmp_path):
    path = tmp_path / "b.h5"
    with h5py.File(path, "w") as f:
        f.create_dataset("x", data=np.arange(4096.0), chunks=(512,), compression="gzip")
        f["text"] = np.array([b"a", b"b"])
        f["object"] = np.array(["a", "b"], dtype=object)
        f["table"] = np.zeros(3, dtype=[("a", "f4"), ("b", "i4")])
        f["type"] = np.dtype("f4")
        f["fill"] = VALUES
        f["fill"].attrs["_FillValue"] = "none at all"
        f["scale"] = VALUES
        f["scale"].attrs["scale_factor"] = "big"
    for variable in ("text", "object", "table"):
        refused(path, variable, "not a dtype of numbers")
    refused(path, "type")
    refused(path, "scale")
    refused(path, "fill")
    data = path.read_bytes()
    with h5py.File(path) as f:
        at = f["x"].id.get_chunk_info(3).byte_offset
    path.write_bytes(data[: at + 9] + b"\xff" * 40 + data[at + 49 :])
    refused(path, "x", "x")
    for n in (0, 3, 100, len(data) // 2):
        path.write_bytes(data[:n])
        refused(path, "x")
    path.write_bytes(b"text")
    refused(path, "x")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        open_array(path, "x")


# Zarr ---------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["filters", "compressor"])
@pytest.mark.parametrize("dtype", ["<f4", "|O"])
def test_a_zarr_array_of_pickles(tmp_path, place, dtype):
    proof, store = tmp_path / "executed", tmp_path / "stranger.zarr"
    array = zarr.create_array(store, shape=(4, 3), chunks=(4, 3), dtype="f4", zarr_format=2,
                              filters=None, compressors=None)  # fmt: skip
    array[:] = VALUES
    (chunk,) = [p for p in store.rglob("*") if p.is_file() and p.name[0] != "."]
    chunk.write_bytes(pickle.dumps(Evil(proof)))
    about = json.loads((store / ".zarray").read_text())
    for codec in ([{"id": "pickle"}], [{"id": "shuffle"}, {"id": "pickle"}]):
        about[place] = codec if place == "filters" else codec[-1]
        about["dtype"] = dtype
        (store / ".zarray").write_text(json.dumps(about))
        refused(store, word="pickle")
    assert not proof.exists()


def test_an_open_array_of_pickles():
    """Where a version of zarr takes them."""
    from zarr.core.dtype import Float32
    from zarr.core.metadata import ArrayV2Metadata

    for codecs in ([numcodecs.Pickle()], [numcodecs.Shuffle(), numcodecs.Pickle()]):
        about = ArrayV2Metadata(
            shape=(4,), dtype=Float32(), chunks=(4,), fill_value=0, order="C", filters=codecs
        )
        with pytest.raises(ValueError, match="a: its chunks are pickles"):
            refuse_pickles(SimpleNamespace(metadata=about), "a")
    nested = {
        "codecs": [
            {"name": "sharding", "configuration": {"codecs": [{"name": "numcodecs.pickle"}]}}
        ]
    }
    with pytest.raises(ValueError, match="pickles"):
        refuse_pickles(SimpleNamespace(metadata=SimpleNamespace(to_dict=lambda: nested)), "a")


def stored(path, **more):
    array = zarr.create_array(
        path, shape=(4, 3), chunks=(2, 3), dtype="f4", compressors=None, **more
    )
    array[:] = VALUES
    return array


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_links_of_a_zarr_store(tmp_path, secret, zarr_format):
    store = tmp_path / "stranger.zarr"
    stored(store, zarr_format=zarr_format)
    (tmp_path / "linked.zarr").symlink_to(store)
    assert (open_array(tmp_path / "linked.zarr").read([(0, 4), (0, 3)]) == VALUES).all()
    chunk = next(p for p in store.rglob("*") if p.is_file() and p.stat().st_size == 24)
    chunk.unlink()
    (secret / "half").write_bytes(bytes(24))
    chunk.symlink_to(secret / "half")
    said = refused(store, word="leads out of the store")
    assert "open it yourself" in said
    refused(f"file://{store}", word="leads out of the store")
    assert open_array(zarr.open(store, mode="r")).read([(0, 4), (0, 3)]).shape == (4, 3)
    # links within the store are its own
    chunk.unlink()
    other = next(p for p in store.rglob("*") if p.is_file() and p.stat().st_size == 24)
    chunk.symlink_to(other)
    open_array(store).read([(0, 4), (0, 3)])


def test_the_metadata_of_a_zarr_store_leads_nowhere(tmp_path, secret):
    stored(secret / "s.zarr")
    store = tmp_path / "stranger.zarr"
    zarr.create_group(store)
    (store / "x").symlink_to(secret / "s.zarr")
    refused(store, "x", "leads out of the store")
    refused(store, None)


BROKEN = {
    "no chunks": dict(chunks=[0, 3]), "negative chunks": dict(chunks=[-1, 3]),
    "a negative shape": dict(shape=[-4, 3]), "other dims": dict(shape=[4]),
    "objects": dict(dtype="|O"), "text": dict(dtype="<U4"), "a text shape": dict(shape="4"),
    "a text fill value": dict(fill_value="nothing"), "no dtype": dict(dtype="none"),
    "a path as separator": dict(dimension_separator="../"), "an unknown codec": dict(compressor={"id": "none"}),
    "another codec": dict(compressor={"id": "zlib", "level": 1}), "a wide dtype": dict(dtype="<f8"),
    "an absurd shape": dict(shape=[2**60, 3], chunks=[2**60, 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_zarr(tmp_path, name):
    store = tmp_path / "b.zarr"
    stored(store, zarr_format=2)
    about = json.loads((store / ".zarray").read_text())
    (store / ".zarray").write_text(json.dumps({**about, **BROKEN[name]}))
    refused(store)


def test_cut_zarr(tmp_path):
    for zarr_format, about in ((2, ".zarray"), (3, "zarr.json")):
        store = tmp_path / f"c{zarr_format}.zarr"
        stored(store, zarr_format=zarr_format)
        chunk = next(p for p in store.rglob("*") if p.is_file() and p.stat().st_size == 24)
        chunk.write_bytes(bytes(10))
        refused(store)
        (store / about).write_text((store / about).read_text()[:50])
        refused(store)
        (store / about).write_text("[]")
        refused(store)


# NumPy, NetCDF ------------------------------------------------------------------------------------


def test_broken_numpy(tmp_path):
    path = tmp_path / "b.npy"
    np.save(path, np.array([Evil(tmp_path / "executed")]), allow_pickle=True)
    refused(path)
    assert not (tmp_path / "executed").exists()
    for values in (np.array(["a"]), np.zeros(2, "datetime64[s]"), np.zeros(2, [("a", "f4")])):
        np.save(path, values)
        refused(path, word="not a dtype of numbers")
    np.save(path, VALUES)
    data = path.read_bytes()
    for broken in (b"", data[:20], data[:-4], data.replace(b"(4, 3)", b"(9, 3)"),
                   data.replace(b"(4, 3)", b"(-4,3)"), data.replace(b"<f4", b"<q9"), b"text"):  # fmt: skip
        path.write_bytes(broken)
        refused(path)
        refused(f"file://{path}")


def test_broken_netcdf(tmp_path):
    netcdf = pytest.importorskip("netCDF4")
    path = tmp_path / "b.nc"
    with netcdf.Dataset(path, "w", format="NETCDF3_CLASSIC") as f:
        f.createDimension("i", 1000)
        f.createVariable("x", "f4", ("i",))[:] = 1
        f.createVariable("text", "S1", ("i",))
    refused(path, "text", "not a dtype of numbers")
    data = path.read_bytes()
    for n in (3, 20, 60):
        path.write_bytes(data[:n])
        refused(path, "x")

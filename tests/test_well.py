"""Files of The Well: read as its schema says, block by block, and written."""

import io
import pickle
import sys

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.io import WellFile, read_sharded, write_well

h5py = pytest.importorskip("h5py")

B, STEPS = 3, 4
SHAPES = {2: (6, 5), 3: (4, 3, 5)}


def schema_file(path, ndim, missing):
    """A file as docs/data_format.md of The Well lists it, and its fields as (B, STEPS, *spatial, C).

    missing: a dim in which a field doesn't vary is left out, as in that text; else it has size 1,
    as The Well's loader wants it.
    """
    rng, shape = np.random.default_rng(0), SHAPES[ndim]
    dims, whole = ["x", "y", "z"][:ndim], {}
    fields = {  # name: order, sample_varying, time_varying, dims in which it doesn't vary
        "plain": (0, True, True, ()),
        "per_sample": (0, True, False, ()),
        "per_step": (0, False, True, ()),
        "constant": (0, False, False, ()),
        "no_first": (0, True, True, (0,)),
        "no_last": (0, False, True, (ndim - 1,)),
        "uniform": (0, True, False, tuple(range(ndim))),
        "vector": (1, True, True, ()),
        "vector_constant": (1, False, False, (1,)),
        "tensor": (2, True, True, ()),
        "tensor_no_first": (2, True, False, (0,)),
    }
    with h5py.File(path, "w") as f:
        f.attrs.update(dataset_name="example", grid_type="cartesian", n_spatial_dims=ndim)
        f.attrs.update(n_trajectories=B, simulation_parameters=["ParamA"], ParamA=1.0)
        group = f.create_group("dimensions")
        group.attrs["spatial_dims"] = dims
        group["time"] = np.arange(STEPS, dtype=np.float32)
        group["time"].attrs["sample_varying"] = False
        for name, n in zip(dims, shape, strict=True):
            group[name] = np.linspace(0, 1, n, dtype=np.float32)
            group[name].attrs.update(sample_varying=False, time_varying=False)
        for name, n, kind in zip(dims, shape, ("PERIODIC", "wall", "open"), strict=False):
            group = f.create_group(f"boundary_conditions/{name}_boundary")
            group.attrs.update(associated_dims=[name], associated_fields=[], bc_type=kind)
            group.attrs.update(sample_varying=False, time_varying=False)
            group["mask"] = np.isin(np.arange(n), [0, n - 1])
            group["values"] = np.zeros(2, dtype=np.float32)
        group = f.create_group("scalars")
        group.attrs["field_names"] = ["ParamA"]
        group["ParamA"] = np.ones(1, dtype=np.float32)
        group["ParamA"].attrs.update(sample_varying=False, time_varying=False)
        for order in range(3):
            group = f.create_group(f"t{order}_fields")
            group.attrs["field_names"] = [k for k, v in fields.items() if v[0] == order]
        for name, (order, by_sample, by_step, fixed) in fields.items():
            sizes = [B if by_sample else 1, STEPS if by_step else 1]
            sizes += [1 if d in fixed else n for d, n in enumerate(shape)]
            data = rng.standard_normal((*sizes, *[ndim] * order)).astype(np.float32)
            full = np.broadcast_to(data, (B, STEPS, *shape, *[ndim] * order))
            whole[name] = torch.from_numpy(full.reshape(B, STEPS, *shape, -1).copy())
            gone = [i for i, varies in enumerate((by_sample, by_step)) if not varies]
            gone += [2 + d for d in fixed] if missing else []
            data = data.squeeze(tuple(gone))
            if order == 2 and missing:  # the text has D^2 components, the loader D, D
                data = data.reshape(*data.shape[:-2], ndim**2)
            stored = f[f"t{order}_fields"].create_dataset(name, data=data)
            stored.attrs["dim_varying"] = [d not in fixed for d in range(ndim)]
            stored.attrs.update(sample_varying=by_sample, time_varying=by_step)
            if order == 2:
                stored.attrs.update(symmetric=False, antisymmetric=False)
    return whole


@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("ndim", [2, 3])
def test_reads_the_schema(tmp_path, ndim, missing):
    whole = schema_file(tmp_path / "example.hdf5", ndim, missing)
    windows = [None, [None] * ndim, [(1, 3)] + [None] * (ndim - 1), [slice(2)] * ndim]
    windows += [[(2, 2)] + [(0, 1)] * (ndim - 1)]  # an empty shard
    with WellFile(tmp_path / "example.hdf5") as file:
        assert (file.shape, file.n_trajectories, file.n_steps) == (SHAPES[ndim], B, STEPS)
        assert file.name == "example"
        kinds = ["periodic", "wall", "open"][:ndim]
        assert list(file.boundary_conditions.values()) == kinds
        orders = {name: field.order for name, field in file.fields.items()}
        assert set(orders) == set(whole)
        assert orders["plain"] == 0 and orders["vector"] == 1 and orders["tensor"] == 2
        for names in ([name] for name in whole):
            check(file, whole, names, None)
        for window in windows:
            check(file, whole, list(whole), window)


def check(file, whole, names, window):
    index = [w if isinstance(w, slice) else slice(*(w or (None,))) for w in window or []]
    for trajectory, step in [(0, 0), (2, 1), (1, 3)]:
        expected = [whole[n][trajectory, step][tuple(index)].movedim(-1, 0) for n in names]
        found = file.read(names, trajectory, step, window)
        assert found.dtype == torch.float32 and found.is_contiguous()
        assert file.channels(names) == len(found)
        torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=0)


def test_other_types_become_float32(tmp_path):
    whole = schema_file(tmp_path / "f", 2, False)
    with h5py.File(tmp_path / "f", "a") as f:
        for name, kind in [("plain", "f8"), ("per_step", ">f4"), ("constant", bool)]:
            old = f["t0_fields"][name]
            data, attributes = old[()].astype(kind), dict(old.attrs)
            del f["t0_fields"][name]
            f["t0_fields"][name] = data
            f["t0_fields"][name].attrs.update(attributes)
        f["dimensions"].attrs["spatial_dims"] = np.array([b"x", b"y"])  # of fixed length
    whole["constant"] = whole["constant"].bool().float()
    with WellFile(tmp_path / "f") as file:
        check(file, whole, ["plain", "per_step", "constant"], [(1, 4), None])


def test_refusals(tmp_path):
    schema_file(tmp_path / "f", 2, True)
    with WellFile(tmp_path / "f") as file:
        for trajectory, step in [(B, 0), (-1, 0), (0, STEPS), (0, -1)]:
            with pytest.raises(IndexError, match=f"{B} trajectories of {STEPS} steps"):
                file.read(["plain"], trajectory, step)
        for window in ((0, 7), (-1, 2), (3, 2), slice(0, 4, 2)):
            with pytest.raises(IndexError, match="window"):
                file.read(["plain"], 0, 0, [window, None])
        with pytest.raises(ValueError):
            file.read(["plain"], 0, 0, [None])
        with pytest.raises(KeyError, match="nothing"):
            file.read(["nothing"], 0, 0)
    with h5py.File(tmp_path / "f", "a") as f:
        f["t0_fields/plain"].attrs["time_varying"] = False
    with pytest.raises(ValueError, match="plain"):
        WellFile(tmp_path / "f")


def test_says_which_extra_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"shardtensor\[io\]"):
        WellFile(tmp_path / "f")


def sample_set(ndim, orders, shape=None):
    torch.manual_seed(0)
    shape = shape or SHAPES[ndim]
    return {f"t{o}": torch.randn(B, STEPS, *shape, *[ndim] * o) for o in orders}


@pytest.mark.parametrize("ndim", [2, 3])
def test_round_trip(tmp_path, ndim):
    path, fields = tmp_path / "f.hdf5", sample_set(ndim, (0, 1, 2))
    times = [0.5 * i for i in range(STEPS)]
    write_well(path, fields, name="mine", times=times, parameters={"nu": 1e-3}, boundary="wall")
    assert [p.name for p in tmp_path.iterdir()] == ["f.hdf5"]
    whole = {name: x.reshape(B, STEPS, *SHAPES[ndim], -1) for name, x in fields.items()}
    with WellFile(path) as file:
        assert (file.name, file.shape) == ("mine", SHAPES[ndim])
        assert set(file.boundary_conditions.values()) == {"wall"}
        check(file, whole, ["t2", "t0", "t1"], None)
    with h5py.File(path) as f:
        assert dict(f.attrs, simulation_parameters=None) == {
            "dataset_name": "mine", "grid_type": "cartesian", "n_spatial_dims": ndim,
            "n_trajectories": B, "nu": 1e-3, "simulation_parameters": None,
        }  # fmt: skip
        assert list(f.attrs["simulation_parameters"]) == ["nu"]
        assert list(f["scalars"].attrs["field_names"]) == ["nu"]
        assert f["scalars/nu"][()] == np.float32(1e-3)
        assert list(f["dimensions"].attrs["spatial_dims"]) == ["x", "y", "z"][:ndim]
        assert f["dimensions/time"][()].tolist() == times
        for order in range(3):
            assert list(f[f"t{order}_fields"].attrs["field_names"]) == [f"t{order}"]
            data = f[f"t{order}_fields/t{order}"]
            assert data.dtype == np.float32 and data.shape == fields[f"t{order}"].shape
            assert data.attrs["sample_varying"] and data.attrs["time_varying"]
            assert data.attrs["dim_varying"].tolist() == [True] * ndim
        for dim, n in zip("xyz", SHAPES[ndim], strict=False):
            np.testing.assert_allclose(f["dimensions"][dim], np.arange(n) / n, rtol=1e-6)
            group = f[f"boundary_conditions/{dim}_wall"]
            assert list(group.attrs["associated_dims"]) == [dim]
            assert np.flatnonzero(group["mask"]).tolist() == [0, n - 1]


def test_vectors_alone_need_lengths(tmp_path):
    fields = sample_set(2, (1,))
    write_well(tmp_path / "f", fields, name="v", times=range(STEPS), lengths=(1.0, 2.0))
    with WellFile(tmp_path / "f") as file:
        assert file.shape == SHAPES[2] and file.fields["t1"].order == 1


@pytest.mark.parametrize(
    "wrong", [(B, STEPS, 6, 4), (B, STEPS, 6, 5, 3), (B, 1, 6, 5), (B, STEPS) + (6, 5, 2) * 2]
)
def test_writes_nothing_of_unequal_shapes(tmp_path, wrong):
    fields = {**sample_set(2, (0,)), "other": torch.zeros(wrong)}
    with pytest.raises(ValueError, match="other"):
        write_well(tmp_path / "f", fields, name="v", times=range(STEPS))
    assert not list(tmp_path.iterdir())


class CountedFile(io.FileIO):
    """A file that counts the bytes read from it."""

    count = 0

    def readinto(self, buffer):
        n = super().readinto(buffer)
        self.count += n
        return n


def test_reads_the_slab_only(tmp_path):
    """The ranks together read each byte once, and nothing else comes from the disk."""
    shape, ranks = (256, 192), 4
    fields = sample_set(2, (0, 1), shape)
    write_well(tmp_path / "f", fields, name="v", times=range(STEPS))
    frame = 3 * 4 * 256 * 192  # three channels of float32
    slabs = []
    for rank in range(ranks):
        with CountedFile(tmp_path / "f") as raw, WellFile(raw) as file:
            opened = raw.count
            rows = (rank * 64, rank * 64 + 64)
            slabs.append(file.read(["t1", "t0"], 1, 2, [rows, None]))
            assert file.bytes_read == frame // ranks
            assert frame // ranks <= raw.count - opened < frame // ranks + 4096
            file.read(["t0"], 1, 2, [(0, 0), None])  # an empty shard
            assert file.bytes_read == frame // ranks
    whole = torch.cat([fields["t1"][1, 2], fields["t0"][1, 2, ..., None]], -1).movedim(-1, 0)
    torch.testing.assert_close(torch.cat(slabs, 1), whole, rtol=0, atol=0)


def test_counts_what_is_stored(tmp_path):
    """A field that doesn't vary along a dim costs its stored points only."""
    schema_file(tmp_path / "f", 2, True)
    with WellFile(tmp_path / "f") as file:
        file.read(["no_first"], 0, 0, [(0, 4), (1, 3)])
        assert file.bytes_read == 2 * 4
        file.read(["uniform"], 0, 0)
        assert file.bytes_read == 3 * 4


def blocks(path):
    """On each rank: bytes that read_sharded reads, its values held against those of the file."""
    mesh = T.make_mesh((2, 2))
    fields, places = ["t0", "t1"], [(0, 1), (1, 2)]
    with WellFile(path) as file:
        x = read_sharded(file, fields, places, mesh, [Shard(2), Shard(3)], sizes={2: (4, 2)})
        read = file.bytes_read
        whole = torch.stack([file.read(fields, *place) for place in places])
        with pytest.raises(ValueError, match="spatial"):
            read_sharded(file, ["t0"], places, mesh, [Shard(0), Shard(2)])
    T.same(x, whole, "blocks")
    return read


def test_each_rank_reads_its_block(tmp_path):
    write_well(tmp_path / "f", sample_set(2, (0, 1)), name="v", times=range(STEPS))
    found = st.simulate(4, blocks, tmp_path / "f")
    assert found == [2 * 3 * rows * columns * 4 for rows in (4, 2) for columns in (3, 2)]


def test_files_are_pickled(tmp_path):
    whole = schema_file(tmp_path / "f", 2, False)
    with WellFile(tmp_path / "f") as file:
        again = pickle.loads(pickle.dumps(file))
        assert torch.equal(again.read(["plain"], 0, 1), file.read(["plain"], 0, 1))
    assert whole
    file = WellFile(io.BytesIO((tmp_path / "f").read_bytes()))
    with file, pytest.raises(TypeError, match="open it by its path"):
        pickle.dumps(file)

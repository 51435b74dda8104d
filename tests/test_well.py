"""Files in The Well's schema, written by us and by hand; blocks read and nothing else."""

import numpy as np
import pytest
import torch
from dataset import generate
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.io import WellFile, read_sharded, write_well

h5py = pytest.importorskip("h5py")


def by_hand(path, shape):
    """The published schema with fields of every kind, by plain h5py."""
    n = len(shape)
    rng = np.random.default_rng(0)
    truth = {}
    with h5py.File(path, "w") as f:
        f.attrs.update(dataset_name="hand", grid_type="cartesian", n_spatial_dims=n)
        f.attrs["n_trajectories"] = 2
        f.attrs["simulation_parameters"] = ["a"]
        dims = f.create_group("dimensions")
        dims.attrs["spatial_dims"] = list("xyz"[:n])
        dims.create_dataset("time", data=np.arange(3, dtype=np.float32))
        for name, size in zip("xyz", shape, strict=False):
            dims.create_dataset(name, data=np.arange(size, dtype=np.float32))
        wall = f.create_group("boundary_conditions").create_group("x_wall")
        wall.attrs["bc_type"] = "wall"
        f.create_group("scalars")

        def field(group, name, sample, time, varying, components=()):
            sizes = [s for s, v in zip(shape, varying, strict=True) if v]
            full = ([2] if sample else []) + ([3] if time else []) + sizes + list(components)
            data = f.require_group(group).create_dataset(
                name, data=rng.standard_normal(full).astype(np.float32)
            )
            data.attrs.update(sample_varying=sample, time_varying=time, dim_varying=varying)
            truth[name] = data[...]

        yes = [True] * n
        field("t0_fields", "density", True, True, yes)
        field("t0_fields", "terrain", False, False, yes)
        field("t0_fields", "mask", True, False, yes)
        field("t0_fields", "profile", True, True, [True] + [False] * (n - 1))
        field("t1_fields", "velocity", True, True, yes, (n,))
        field("t2_fields", "stress", False, True, yes, (n, n))
    return truth


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3)])
def test_files_of_the_well(tmp_path, shape):
    truth = by_hand(tmp_path / "a.hdf5", shape)
    n = len(shape)
    with WellFile(tmp_path / "a.hdf5") as f:
        assert f.shape == shape and f.n_trajectories == 2 and f.n_steps == 3 and f.name == "hand"
        assert f.boundary_conditions == {"x_wall": "wall"}
        assert {k: v.order for k, v in f.fields.items()}["velocity"] == 1
        assert f.channels(["density", "velocity", "stress"]) == 1 + n + n * n
        block = [(1, 4), *[None] * (n - 1)]
        every = ["density", "terrain", "mask", "profile", "velocity", "stress"]
        got = f.read(every, 1, 2, block)
        assert got.dtype == torch.float32
        want = [truth["density"][1, 2], truth["terrain"], truth["mask"][1]]
        want.append(np.broadcast_to(
            truth["profile"][1, 2].reshape(-1, *[1] * (n - 1)), shape))  # fmt: skip
        want += list(np.moveaxis(truth["velocity"][1, 2], -1, 0))
        want += list(np.moveaxis(truth["stress"][2].reshape(*shape, -1), -1, 0))
        assert np.array_equal(got.numpy(), np.stack(want)[:, 1:4])
        with pytest.raises(IndexError, match="3 steps"):
            f.read(every, 0, 3)
        with pytest.raises(IndexError, match="window"):
            f.read(every, 0, 0, [(0, 99), *[None] * (n - 1)])


def test_round_trip_reads_only_the_block(tmp_path):
    scalar, vector = torch.randn(2, 3, 8, 6), torch.randn(2, 3, 8, 6, 2)
    write_well(tmp_path / "b.hdf5", {"w": scalar, "u": vector}, name="b", times=[0, 1, 2],
               parameters={"nu": 0.5})  # fmt: skip
    with h5py.File(tmp_path / "b.hdf5") as f:
        assert f.attrs["nu"] == 0.5 and f.attrs["grid_type"] == "cartesian"
        assert list(f["t1_fields"].attrs["field_names"]) == ["u"]
        assert f["t0_fields/w"].shape == (2, 3, 8, 6) and f["dimensions/x"].shape == (8,)
    with WellFile(tmp_path / "b.hdf5") as f:
        whole = f.read(["w", "u"], 1, 2)
        assert torch.equal(whole[0], scalar[1, 2])
        assert torch.equal(whole[1:], vector[1, 2].movedim(-1, 0))
        before = f.bytes_read
        part = f.read(["w"], 0, 1, [slice(2, 5), (1, 3)])
        assert torch.equal(part[0], scalar[0, 1, 2:5, 1:3]) and f.bytes_read - before == 6 * 4


def slabs(path):
    mesh = T.make_mesh((2, 2))
    with WellFile(path) as f:
        x = read_sharded(f, ["vorticity", "velocity"], [(0, 1), (1, 2)], mesh, [Shard(2), Shard(3)],
                         sizes={2: (9, 7)})  # fmt: skip
        read = f.bytes_read
        want = torch.stack([f.read(["vorticity", "velocity"], *p) for p in [(0, 1), (1, 2)]])
        with pytest.raises(ValueError, match="spatial"):
            read_sharded(f, ["vorticity"], [(0, 0)], mesh, [Shard(0), Shard(2)])
    T.same(x, want, "slabs")
    return read


def test_each_rank_reads_its_slab(tmp_path):
    generate(tmp_path / "c.hdf5", (16, 12), 2, 3, spin_up=0.1, interval=0.1)
    found = st.simulate(4, slabs, tmp_path / "c.hdf5")
    assert found == [2 * 3 * rows * 6 * 4 for rows in (9, 9, 7, 7)]

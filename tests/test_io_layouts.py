"""Stores laid out as they are published, made small, read end to end: loader, model, gradient, one device's."""

import numpy as np
import pytest
import torch
from samples import mesh_of
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import io

zarr = pytest.importorskip("zarr")
LAT, LON, LEVELS, STEPS = 9, 12, [500, 850, 1000], 7


def array(group, name, values, dims, chunks=None, **attrs):
    made = group.create_array(
        name, data=values, chunks=chunks or tuple(values.shape), fill_value=None
    )
    made.attrs.update({**attrs, "_ARRAY_DIMENSIONS": list(dims)})


def fields(draw, *shape):
    return draw.standard_normal((STEPS, *shape)).astype("f4")


def weatherbench(path):
    """weatherbench2/datasets/era5/1959-2023_01_10-6h-64x32_equiangular_conservative.zarr: longitude first."""
    draw, group = np.random.default_rng(0), zarr.open_group(path, mode="w", zarr_format=2)
    array(group, "time", np.arange(STEPS) * 6, ["time"], units="hours since 1959-01-01")
    array(group, "level", np.array(LEVELS), ["level"])
    array(group, "longitude", np.arange(LON) * 30.0, ["longitude"])
    array(group, "latitude", np.linspace(-80, 80, LAT), ["latitude"])
    t, z = fields(draw, LON, LAT), fields(draw, 3, LON, LAT)
    array(group, "2m_temperature", t, ["time", "longitude", "latitude"], (4, LON, LAT))
    array(group, "geopotential", z, ["time", "level", "longitude", "latitude"], (4, 3, LON, LAT))
    zarr.consolidate_metadata(path)
    return np.concatenate([t[:, None], z[:, [0, 1]]], 1).swapaxes(-1, -2)


def arco(path):
    """gcp-public-data-arco-era5/ar/full_37-1h-0p25deg-chunk-1.zarr-v3: latitudes from the north, each hour a
    chunk, times since 1900, more variables and coordinates than are asked for."""
    draw, group = np.random.default_rng(1), zarr.open_group(path, mode="w", zarr_format=2)
    hours = np.arange(STEPS) + 24 * 365
    array(
        group,
        "time",
        hours,
        ["time"],
        units="hours since 1900-01-01",
        calendar="proleptic_gregorian",
    )
    array(group, "level", np.array(LEVELS), ["level"])
    array(
        group,
        "latitude",
        np.linspace(90, -90, LAT).astype("f4"),
        ["latitude"],
        units="degrees_north",
    )
    array(group, "longitude", (np.arange(LON) * 30).astype("f4"), ["longitude"])
    t, z = fields(draw, LAT, LON), fields(draw, 3, LAT, LON)
    dims = ["time", "latitude", "longitude"]
    array(group, "2m_temperature", t, dims, (1, LAT, LON), units="K", short_name="t2m")
    array(group, "geopotential", z, [dims[0], "level", *dims[1:]], (1, 3, LAT, LON))
    array(group, "sea_surface_temperature", fields(draw, LAT, LON) * np.nan, dims, (1, LAT, LON))
    zarr.consolidate_metadata(path)
    return np.concatenate([t[:, None], z[:, [0, 1]]], 1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()


def trained(batches, model):
    """The losses, and the gradient at the end."""
    losses = []
    for x, y in batches:
        loss = (model(x.double()) - y.double()).square().mean()
        loss.backward()
        losses.append(loss.item())
    return losses, model[0].weight.grad


@pytest.mark.parametrize("make", [weatherbench, arco])
@pytest.mark.parametrize("shape", [(1, 2), (2, 2)])
def test_weather(tmp_path, make, shape):
    url = str(tmp_path / "a.zarr")
    values = torch.from_numpy(make(url).copy())
    names = ["2m_temperature", "geopotential"]

    def run():
        mesh = mesh_of(shape)
        data = io.LatLon(url, names, mesh["domain"], [Shard(1)], levels=[500, 850])
        sampler = io.DomainSampler(len(data), mesh, shuffle=False)
        loader = io.Loader(data, mesh, batch_size=2 // shape[0], sampler=sampler)
        model = st.parallelize(net(), mesh, data="data")
        losses, grad = trained(((b["x"], b["y"]) for b in loader), model)
        return losses, grad, mesh.get_local_rank("data")

    ranks = st.simulate(shape[0] * shape[1], run)
    batches = [(values[[i, i + 1]], values[[i + 1, i + 2]]) for i in (0, 2, 4)]
    losses, grad = trained(batches, net())
    for _, found, _ in ranks:
        torch.testing.assert_close(found, grad, rtol=0, atol=1e-9)
    mean = np.mean([{g: f for f, _, g in ranks}[g] for g in range(shape[0])], axis=0)
    np.testing.assert_allclose(mean, losses, rtol=1e-9)


def test_the_well(tmp_path):
    pytest.importorskip("h5py")
    u = torch.randn(2, 5, 10, 8, generator=torch.Generator().manual_seed(0))
    v = torch.randn(2, 5, 10, 8, 2, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "turbulence_gamma_2d_train_0.hdf5"
    io.write_well(path, {"density": u, "velocity": v}, name="turbulence", times=range(5))

    def run():
        mesh = mesh_of((1, 3))["domain"]
        with io.WellFile(path) as file:
            places = [(0, 0), (1, 2)]
            cut = dict(sizes={2: (5, 0, 5)})
            x, y = (
                io.read_sharded(file, ["density", "velocity"], p, mesh, [Shard(2)], **cut)
                for p in (places, [(t, s + 1) for t, s in places])
            )
            return trained([(x, y)], st.parallelize(net(), mesh))

    whole = torch.cat([u[:, :, None], v.movedim(-1, 2)], 2)
    want = trained([(whole[[0, 1], [0, 2]], whole[[0, 1], [1, 3]])], net())
    for losses, grad in st.simulate(3, run):
        np.testing.assert_allclose(losses, want[0], rtol=1e-9)
        torch.testing.assert_close(grad, want[1], rtol=0, atol=1e-9)


def test_random_windows_are_the_same_for_any_number_of_ranks(tmp_path):
    """A window of a large array for each sample, placed by the sample's number: as docs/loading.md has it."""
    url = str(tmp_path / "a.zarr")
    group = zarr.open_group(url, mode="w")
    values = torch.arange(5.0 * 40 * 30).reshape(5, 40, 30)
    group.create_array(
        "t", data=values.numpy(), chunks=(1, 10, 30), dimension_names=["time", "y", "x"]
    )

    class Windows:
        def __init__(self, mesh, size, count):
            self.source, self.mesh = io.open_array(url, "t"), mesh
            self.size, self.count = size, count

        def __len__(self):
            return self.count

        def __getitem__(self, i):
            draw = np.random.default_rng(i)
            time, a, b = (int(draw.integers(n)) for n in (5, 40 - self.size, 30 - self.size))
            index = {"time": time, "y": slice(a, a + self.size), "x": slice(b, b + self.size)}
            return io.read(self.source, self.mesh, [Shard(0)], index=index)

    def run(shape):
        mesh = mesh_of(shape)
        data = Windows(mesh["domain"], 8, 6)
        sampler = io.DomainSampler(6, mesh)
        loader = io.Loader(data, mesh, batch_size=2 // shape[0], sampler=sampler)
        return [b.full_tensor() for b in loader], mesh.get_local_rank("data")

    def rounds(shape):
        ranks = st.simulate(shape[0] * shape[1], run, shape)
        groups = {g: batches for batches, g in ranks}
        turns = zip(*(groups[g] for g in sorted(groups)), strict=True)
        return [{tuple(x.flatten().tolist()) for part in turn for x in part} for turn in turns]

    one = rounds((1, 1))
    assert one == rounds((1, 3)) == rounds((2, 2)) and len(one) == 3
    assert all(len(r) == 2 for r in one)


@pytest.mark.parametrize("shape", [(1, 3), (2, 2)])
def test_drivaerml(tmp_path, shape):
    """Cars by STL, VTP and VTU in a folder each: converted once, points dealt to ranks, a model of points."""
    pytest.importorskip("test_io_meshes").drivaerml(tmp_path, runs=(1, 2, 3, 4))
    folders = []
    for case in io.cases(tmp_path, "drivaerml"):
        folders.append(case["folder"] / "surface")
        io.convert(case["surface"], folders[-1], fields=["CpMeanTrim"], rename={"CpMeanTrim": "cp"})

    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def loss_of(model, car):
        rows = torch.cat([car["coordinates"], car["normals"]], -1).double()
        near = rows - rows.mean(0)  # of the whole car
        off = (model(near)[:, 0] - car["cp"].double()).square()
        area = car["sizes"].double()
        return (off * area).sum() / area.sum()

    def run():
        mesh = mesh_of(shape)
        data = io.Points(folders, mesh["domain"], most=100)
        sampler = io.DomainSampler(4, mesh, shuffle=False)
        model, losses = st.parallelize(made(), mesh, data="data"), []
        for batch in io.Loader(data, mesh, sampler=sampler):
            losses.append(loss_of(model, {k: v[0] for k, v in batch.items()}))
            losses[-1].backward()
        return (
            [float(x.detach()) for x in losses],
            model[0].weight.grad,
            mesh.get_local_rank("data"),
        )

    ranks = st.simulate(shape[0] * shape[1], run)
    alone = {}

    def whole():
        data = io.Points(folders, mesh_of((1,)), most=100)
        alone.update({i: {k: v.full_tensor() for k, v in data[i].items()} for i in range(4)})

    st.simulate(1, whole)
    model = made()
    losses = [loss_of(model, alone[i]) for i in range(4)]
    (sum(losses) / shape[0]).backward()
    for found, grad, group in ranks:
        np.testing.assert_allclose(found, [x.item() for x in losses[group :: shape[0]]], rtol=1e-9)
        torch.testing.assert_close(grad, model[0].weight.grad, rtol=0, atol=1e-9)

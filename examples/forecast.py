"""A weather model from data to pictures: train, validate, forecast with an ensemble, write, plot.

    python examples/forecast.py out/forecast                                    # one device
    torchrun --nproc-per-node 4 examples/forecast.py out/forecast --data 2      # 2 x 2 ranks

A store in WeatherBench 2's layout is made if none is given: waves that travel eastward around the
globe. Its statistics are found by all ranks. The mesh has the axes data (samples in training,
members of the ensemble in the forecast) and domain (latitudes of each sample). In out/forecast are
then scores.json, forecast.zarr, which xarray opens, and forecast.png.
"""

import argparse
import json
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import scores
import torch
import torch.nn.functional as F
import zarr
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import io

FIELDS = {"2m_temperature": "K", "mean_sea_level_pressure": "Pa"}


def make_store(path, shape, steps, seed=0):
    """Fields (time, latitude, longitude) of waves with drift, every six hours."""
    draw = np.random.default_rng(seed)
    lat, lon = np.linspace(90, -90, shape[0]), np.arange(shape[1]) * 360 / shape[1]
    time = np.arange(steps)
    group = zarr.open_group(path, mode="w", zarr_format=2)
    axes = {"time": (time * 6, {"units": "hours since 2020-01-01"}), "latitude": (lat, {})}
    for name, (values, attrs) in {**axes, "longitude": (lon, {})}.items():
        made = group.create_array(name, data=values, fill_value=None)
        made.attrs.update({**attrs, "_ARRAY_DIMENSIONS": [name]})
    for name, mean, size in (("2m_temperature", 285, 12), ("mean_sea_level_pressure", 1e5, 900)):
        field = np.full((steps, *shape), mean, dtype="f8")
        for k in (1, 2, 3, 5):
            angle = np.deg2rad(k * lon)[None, None] - 0.15 * k * time[:, None, None]
            where = np.cos(np.deg2rad(lat)) ** k * np.cos(np.deg2rad(lat) * draw.integers(1, 4))
            field += size / k * where[:, None] * np.cos(angle + draw.uniform(0, 6))
        made = group.create_array(
            name, data=field.astype("f4"), chunks=(1, *shape), fill_value=None
        )
        made.attrs["_ARRAY_DIMENSIONS"] = ["time", "latitude", "longitude"]


class Globe(nn.Module):
    """The change of the state in one step, by convolutions on the sphere: plain PyTorch but for the
    pads across the poles, which take plain fields, too.
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 5) for _ in range(depth))
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(st.sphere.pad_sphere(x, (1, 1, 1, 1)))
        for block in self.blocks:
            h = h + F.gelu(block(st.sphere.pad_sphere(h, (2, 2, 2, 2))))
        return x + self.last(h)


def train(model, data, mesh, area, args):
    """Steps of AdamW on the mean squared error by area; returns the losses."""
    sampler = io.DomainSampler(len(data), mesh)
    loader = io.Loader(data, mesh, batch_size=args.batch // mesh["data"].size(), sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    while len(losses) < args.steps:
        for batch in loader:
            x, y = (batch[k].to(args.dtype) for k in "xy")
            loss = scores.mean_over_globe((model(x) - y).square(), area).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(over_data(loss.detach(), mesh))
            if len(losses) == args.steps:
                break
    return losses


def over_data(x, mesh):
    """The mean of what each domain group has, as plain numbers."""
    x = whole(x)
    torch.distributed.all_reduce(x, group=mesh.get_group("data"))
    return (x / mesh["data"].size()).tolist()


def whole(x):
    return (x.full_tensor() if isinstance(x, st.ShardTensor) else x).clone()


@torch.no_grad()
def validate(model, data, mesh, area, args):
    """Scores of one step: each group of ranks has samples of its own, sharded by latitude.

    Samples that fill no round of groups are left out.
    """
    sampler = io.DomainSampler(len(data), mesh, shuffle=False)
    climate = sum(data.state(i).to(args.dtype) for i in range(len(data.times))) / len(data.times)
    found = []
    for batch in io.Loader(data, mesh, sampler=sampler):
        x, y = (batch[k].to(args.dtype) for k in "xy")
        forecast = model(x)
        found.append(
            {
                "rmse": scores.rmse(forecast, y, area).square(),
                "persistence": scores.rmse(x, y, area).square(),
                "acc": scores.acc(forecast, y, climate, area),
                "spectrum": scores.spectrum(forecast, area),
                "spectrum_truth": scores.spectrum(y, area),
            }
        )
    mean = {k: over_data(sum(whole(f[k]) for f in found) / len(found), mesh) for k in found[0]}
    # the root comes after the mean over samples
    return mean | {k: [v**0.5 for v in mean[k]] for k in ("rmse", "persistence")}


@torch.no_grad()
def forecast(model, data, mesh, area, args, url):
    """An ensemble from perturbed states, members over data ranks: written and scored each step."""
    groups, mine = mesh["data"].size(), mesh.get_local_rank("data")
    per_group = args.members // groups
    start = data.state(0).to(args.dtype)
    states = []
    # as one device draws them, for any number of ranks; CUDA has no such draw
    as_one = st.random.match_single_device() if start.device.type == "cpu" else nullcontext()
    with as_one:
        for member in range(mine * per_group, (mine + 1) * per_group):
            torch.manual_seed(member)
            states.append(start + args.noise * torch.randn_like(start))
    x = torch.stack(states)
    found = []
    for step in range(1, args.roll + 1):
        x = model(x)
        # the same values as a tensor over both axes of the mesh: nothing is sent
        members = st.ShardTensor.from_local(x.to_local(), mesh, [Shard(0), Shard(2)])
        write(members, data, url, step)
        # all members of fewer longitudes: one all-to-all
        members = members.redistribute(placements=[Shard(3), Shard(2)])
        truth = data.state(step).to(args.dtype).to_local()
        truth = st.ShardTensor.from_local(truth, mesh, [Replicate(), Shard(1)])
        truth = truth.redistribute(placements=[Shard(2), Shard(1)])
        mean = members.mean(0, keepdim=True)
        found.append(
            {
                "crps": whole(scores.crps(members, truth, area)).tolist(),
                "rmse_of_mean": whole(scores.rmse(mean, truth[None], area)).tolist(),
            }
        )
    return found


def write(members, data, url, step):
    """One time of the forecast, in the units of the data, members along their own dim."""
    for c, (name, unit) in enumerate(FIELDS.items()):
        field = members[:, c].float() * float(data.std[c]) + float(data.mean[c])
        coords = {"number": np.arange(field.shape[0]), "time": data.times[step]}
        coords |= {"latitude": data.latitude, "longitude": data.longitude}
        dims = ("time", "number", "latitude", "longitude")
        io.write_zarr(
            field, url, name, step=step - 1, dims=dims, coords=coords, attrs={"units": unit}
        )


def plot(path, url, result):
    """Mean and spread at the end of the forecast, and spectra, as one picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    name, unit = next(iter(FIELDS.items()))
    group = zarr.open_group(url, mode="r")
    last = group[name][-1]
    lon, lat = group["longitude"][:], group["latitude"][:]
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    for ax, values, title in ((left, last.mean(0), "mean"), (middle, last.std(0), "spread")):
        fig.colorbar(ax.pcolormesh(lon, lat, values), ax=ax, label=unit)
        ax.set(title=f"{name}: {title}", xlabel="longitude", ylabel="latitude")
    right.loglog(result["spectrum_truth"][0][1:], label="truth")
    right.loglog(result["spectrum"][0][1:], label="forecast")
    right.set(title="power by zonal wavenumber", xlabel="wavenumber")
    right.legend()
    fig.savefig(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--store", help="in WeatherBench 2's layout; default: one is made")
    parser.add_argument("--data", type=int, default=1, help="groups of ranks")
    parser.add_argument("--shape", type=int, nargs=2, default=(32, 64))
    parser.add_argument("--times", type=int, default=48, help="of the store that is made")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="samples of all groups together")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--roll", type=int, default=6, help="steps of the forecast")
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--double", action="store_true")
    args = parser.parse_args()
    if args.members % args.data or args.batch % args.data:
        parser.error(f"{args.members} members, batches of {args.batch} for {args.data} groups")
    args.dtype = torch.float64 if args.double else torch.float32
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    mesh, device = st.init(data=args.data, domain=-1)
    first = torch.distributed.get_rank() == 0
    store = args.store or str(args.folder / "data.zarr")
    if first and not args.store:
        make_store(store, args.shape, args.times)
    torch.distributed.barrier()

    cut = [Shard(1)]
    raw = io.LatLon(store, list(FIELDS), mesh["domain"], cut)
    past, later = slice(0, len(raw.times) * 3 // 4), slice(len(raw.times) * 3 // 4, None)
    mean, std = raw.statistics(times=range(*past.indices(len(raw.times))))
    norm = dict(mean=mean, std=std)
    data = io.LatLon(store, list(FIELDS), mesh["domain"], cut, times=past, **norm)
    check = io.LatLon(store, list(FIELDS), mesh["domain"], cut, times=later, **norm)
    area = data.area_weights().to(device, args.dtype)

    torch.manual_seed(0)
    model = Globe(len(FIELDS), args.width, 2).to(device, args.dtype)
    model = st.parallelize(model, mesh, data="data")
    losses = train(model, data, mesh, area, args)
    model.eval()
    result = {"losses": losses, **validate(model, check, mesh, area, args)}
    url = str(args.folder / "forecast.zarr")
    result["forecast"] = forecast(model, check, mesh, area, args, url)
    if first:
        (args.folder / "scores.json").write_text(json.dumps(result))
        plot(args.folder / "forecast.png", url, result)
        print(f"loss {losses[0]:.4f} to {losses[-1]:.4f}")
        for i, name in enumerate(FIELDS):
            print(
                f"{name}: RMSE {result['rmse'][i]:.4f} (persistence "
                f"{result['persistence'][i]:.4f}), ACC {result['acc'][i]:.4f}, CRPS after "
                f"{args.roll} steps {result['forecast'][-1]['crps'][i]:.4f}"
            )


if __name__ == "__main__":
    main()

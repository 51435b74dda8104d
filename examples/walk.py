"""A model of one's own on data of one's own: train, validate, resume, forecast.

    python examples/walk.py data out/walk                                # makes a small store
    python examples/walk.py train out/walk --steps 8                     # one device
    torchrun --nproc-per-node 2 examples/walk.py train out/walk --steps 8
    torchrun --nproc-per-node 4 examples/walk.py train out/walk --data 2 --fsdp all

Called again it goes on from its latest checkpoint. `docs/walk.md` goes through it,
`benchmarks/walk.py` times all of it in a fresh environment.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Shard
from walk_model import Weather

import shardtensor as st
from shardtensor import checkpoint, io

SURFACE, UPPER, STATIC = ["t2m", "msl"], ["t", "z"], ["orography", "land"]


def make(path, steps=24, levels=3, shape=(33, 64)):
    """Waves that travel, every six hours: a store as xarray writes it."""
    draw = np.random.default_rng(0)
    lat, lon = np.linspace(90, -90, shape[0]), np.arange(shape[1]) * 360 / shape[1]
    phase = np.deg2rad(lon) - 0.3 * np.arange(steps)[:, None]

    def field(*more):
        wave = np.cos(phase[:, None] * draw.integers(1, 4)) * np.cos(np.deg2rad(lat))[:, None]
        wave = wave.reshape(steps, *[1] * len(more), *shape)
        return (wave + 0.1 * draw.normal(size=(steps, *more, *shape))).astype("f4")

    place = ("latitude", "longitude")
    fields = {n: (("time", *place), field()) for n in SURFACE}
    fields |= {n: (("time", "level", *place), field(levels)) for n in UPPER}
    fields |= {n: (place, draw.normal(size=shape).astype("f4")) for n in STATIC}
    time = np.datetime64("2020-01-01", "ns") + np.arange(steps) * np.timedelta64(6, "h")
    coords = {"time": time, "level": 1000 - 250 * np.arange(levels)}
    data = xr.Dataset(fields, coords | dict(zip(place, (lat, lon), strict=True)))
    # a step in each chunk
    chunks = {n: {"chunks": (1, *data[n].shape[1:])} for n in SURFACE + UPPER}
    data.to_zarr(path, mode="w", encoding=chunks, consolidated=True, zarr_format=2)


class Store:
    """Samples: a dict of the fields at one time, and of those one step later.

    Each rank reads the latitudes that it holds; nothing is communicated.
    """

    def __init__(self, path, mesh, times, dtype=torch.float32):
        self.data, self.mesh, self.times, self.dtype = xr.open_zarr(path), mesh, times, dtype
        self.static = self.read(STATIC, 0)

    def read(self, names, dim, **index):
        """Fields one over the other; dim: that of latitudes in each."""
        each = [io.read(self.data[n], self.mesh, [Shard(dim)], index=index) for n in names]
        return torch.stack(each).to(self.dtype)

    def state(self, i):
        return {"surface": self.read(SURFACE, 0, time=i), "upper": self.read(UPPER, 1, time=i)}

    def __len__(self):
        return len(self.times) - 1

    def __getitem__(self, i):
        i = int(self.times[i])
        hour = torch.tensor(float(self.data.time[i].dt.hour), dtype=self.dtype)
        return self.state(i) | {"static": self.static, "hour": hour}, self.state(i + 1)

    def area(self):
        """Weights of latitudes, (H, 1), of mean 1."""
        latitude = io.read(self.data["latitude"], self.mesh, [Shard(0)]).to(self.dtype)
        weight = torch.cos(torch.deg2rad(latitude)).clamp(min=0)
        return (weight / weight.mean())[:, None]


def error(out: dict[str, Tensor], truth: dict[str, Tensor], area: Tensor) -> Tensor:
    """Mean squares by area, summed over the kinds of fields."""
    return sum(((out[k] - truth[k]).square() * area).mean() for k in truth)


def over_groups(x: Tensor, mesh) -> float:
    """The mean over groups of ranks, which have samples of their own. All ranks call it."""
    found = torch.tensor(x.item(), dtype=torch.float64, device=x.device)
    torch.distributed.all_reduce(found, group=mesh.get_group("data"))
    return found.item() / mesh["data"].size()


def train(folder, steps=8, data=1, fsdp=None, name="run", roll=4, double=False):
    """{"loss": of each step, "rmse": of validation}; the forecast in the run's folder."""
    folder, dtype = Path(folder), torch.float64 if double else torch.float32
    mesh, device = st.init(data=data, domain=-1)
    domain = mesh["domain"]
    torch.manual_seed(0)
    model = Weather().to(device, dtype)
    options = {"fsdp": fsdp, "blocks": ["Block"]} if fsdp else {}
    st.parallelize(model, mesh, data="data", **options)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    past, later = (
        Store(folder / "data.zarr", domain, t, dtype) for t in (range(17), range(16, 24))
    )
    loader = io.Loader(past, mesh, batch_size=4 // data)
    area = past.area()

    def state(step, losses):
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "schedule": schedule.state_dict(),
                "loader": loader.state_dict(), "step": step, "losses": losses}  # fmt: skip

    losses: list[float] = []
    if path := checkpoint.latest(folder / name):
        found = checkpoint.load(state(0, []), path, strict=False)
        set_state_dict(model, optimizer, model_state_dict=found["model"],
                       optim_state_dict=found["optimizer"])  # fmt: skip
        schedule.load_state_dict(found["schedule"])
        loader.load_state_dict(found["loader"])
        losses = list(found["losses"])
    while len(losses) < steps:
        for x, y in loader:
            loss = error(model(x), y, area)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(over_groups(loss, mesh))
            if len(losses) == steps:
                break
    checkpoint.save(state(steps, losses), folder / name, f"step{steps}")
    model.eval()
    with torch.no_grad():
        every = io.DomainSampler(len(later), mesh, shuffle=False)
        found = [
            over_groups(error(model(x), y, area), mesh)
            for x, y in io.Loader(later, mesh, sampler=every)
        ]
        # all groups have the same forecast; with FSDP2 over all ranks all must call the model
        url = folder / name / "forecast.zarr" if mesh.get_local_rank("data") == 0 else None
        forecast(model, later, url, roll)
    return {"loss": losses, "rmse": (sum(found) / len(found)) ** 0.5}


def forecast(model, data, url, steps):
    """From the first time of data, written step by step for xarray; url None: by other ranks."""
    x = {k: v[None] for k, v in data[0][0].items()}
    begin = data.data.time.values[data.times[0]]
    places = {n: data.data[n].values for n in ("latitude", "longitude")}
    for i in range(steps):
        out = model(x)
        x = x | out | {"hour": (x["hour"] + 6) % 24}
        time = begin + np.timedelta64(6, "h") * (i + 1)
        for c, name in enumerate(SURFACE if url else ()):
            io.write_zarr(
                out["surface"][0, c], url, name, step=i, dims=("time", "latitude", "longitude"),
                coords={"time": time, **places},
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["data", "train"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--data", type=int, default=1, help="groups of ranks with other samples")
    parser.add_argument("--fsdp", choices=["data", "all"])
    parser.add_argument("--name", default="run", help="a folder for checkpoints and results")
    parser.add_argument("--double", action="store_true")
    args = vars(parser.parse_args())
    if args.pop("what") == "data":
        return make(args["folder"] / "data.zarr")
    result = train(**args)
    if torch.distributed.get_rank() == 0:
        (args["folder"] / args["name"] / "result.json").write_text(json.dumps(result))
        print(*(f"step {i}: {loss:.7f}" for i, loss in enumerate(result["loss"])), sep="\n")
        print(f"rmse of validation: {result['rmse']:.7f}")


if __name__ == "__main__":
    main()

"""Storm-scale diffusion: EDM models of satellite and radar fields, each sample on several ranks.

Simulates storms (shallow_water.py) and trains two diffusion transformers (dit.py): one makes the
next satellite image from the last, the other the radar image that goes with it. It does so on one
device and on 2 processes (or all GPUs) with the same noise, samples from both, and holds them
against each other: a picture and two CSV files in out/.

    python examples/storm_diffusion.py
    torchrun --nproc-per-node 8 examples/storm_diffusion.py --data 2 --columns 2   # 2 x (2 x 2)

The mesh has the axes data (samples of a batch; FSDP2 shards the parameters over it), h and w (rows
and columns of every sample).
"""

import argparse
import csv
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dit
import torch
import torch.distributed as dist
import zarr
from shallow_water import RADAR, SATELLITE, generate
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shardtensor as st
from shardtensor.train.launch import place

FIELDS = SATELLITE | RADAR
PLACEMENTS = [Shard(2), Shard(3)]


@st.rule("dit.na2d")
def na2d(query: Tensor, key: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """The model's neighbourhood attention on shards."""
    return st.neighborhood_attention(query, key, value, kernel_size)


@dataclass(frozen=True)
class Stage:
    """The fields of the next frame that a model makes, of this frame and the next that it sees."""

    target: tuple[str, ...]
    now: tuple[str, ...]
    later: tuple[str, ...] = ()


STAGES = {
    "satellite": Stage(tuple(SATELLITE), now=tuple(SATELLITE)),
    "radar": Stage(tuple(RADAR), now=tuple(RADAR), later=tuple(SATELLITE)),
}


@dataclass(frozen=True)
class Where:
    """Where this process's part of a batch lies. mesh: (data, h, w); None: all on one device."""

    device: torch.device
    mesh: DeviceMesh | None = None
    dtype: torch.dtype = torch.float32

    def share(self, batch: Sequence[Any]) -> Any:
        """This rank's samples of a batch, which it shares with its peers along h and w."""
        n = 1 if self.mesh is None else self.mesh["data"].size()
        if len(batch) % n:
            raise ValueError(f"{len(batch)} samples do not divide by {n} ranks along data")
        first = 0 if self.mesh is None else self.mesh.get_local_rank("data") * len(batch) // n
        return batch[first : first + len(batch) // n]

    def spec(self, shape: Sequence[int]) -> st.Spec | None:
        """How a tensor (B, C, H, W) lies on the mesh."""
        return None if self.mesh is None else st.Spec.of(self.mesh["h", "w"], PLACEMENTS, shape)

    def tensor(self, shape: Sequence[int], make: Callable[[int, slice, slice], Tensor]) -> Tensor:
        """A tensor (B, C, H, W). make(b, rows, columns): this rank's part (C, ...) of sample b."""
        spec = self.spec(shape)
        starts, sizes = (
            ((0, 0), shape[2:]) if spec is None else (spec.offset[2:], spec.local_shape[2:])
        )
        block = [slice(a, a + n) for a, n in zip(starts, sizes, strict=True)]
        local = torch.stack([make(b, *block) for b in range(shape[0])]).to(self.device, self.dtype)
        if spec is None:
            return local
        return st.ShardTensor.from_local(local, spec.mesh, PLACEMENTS, sizes=spec.sizes)


class Storms:
    """Fields of a Zarr group (time, latitude, longitude), scaled to mean 0 and deviation 1."""

    def __init__(self, path: Path, where: Where) -> None:
        self.root, self.where = zarr.open_group(path, mode="r"), where
        self.shape: tuple[int, int] = self.root["height"].shape[1:]

    def scale(self, name: str) -> tuple[float, float]:
        return self.root[name].attrs["mean"], self.root[name].attrs["std"]

    def read(self, names: Sequence[str], frames: Sequence[int]) -> Tensor:
        """Fields (frames, names, H, W) at some times; each rank reads its rows and columns only."""

        def block(b: int, rows: slice, columns: slice) -> Tensor:
            values = (self.root[n][frames[b], rows, columns] for n in names)
            scaled = zip(values, map(self.scale, names), strict=True)
            return torch.stack([(torch.from_numpy(v) - mean) / std for v, (mean, std) in scaled])

        return self.where.tensor((len(frames), len(names), *self.shape), block)

    def given(self, stage: Stage, frames: Sequence[int], later: Tensor | None = None) -> Tensor:
        """What a stage's model sees. later: instead of the true fields of the next frame."""
        now = self.read(stage.now, frames)
        if stage.later and later is None:
            later = self.read(stage.later, [f + 1 for f in frames])
        return torch.cat([later, now], 1) if stage.later else now

    def noise(self, seeds: Sequence[int], channels: int) -> Tensor:
        """Normal numbers (seeds, channels, H, W): each sample's from its seed, however sharded.

        Every rank draws them all on the CPU and keeps its own.
        """

        def block(b: int, rows: slice, columns: slice) -> Tensor:
            made = torch.Generator().manual_seed(seeds[b])
            whole = torch.randn(channels, *self.shape, generator=made, dtype=self.where.dtype)
            return whole[:, rows, columns]

        return self.where.tensor((len(seeds), channels, *self.shape), block)


def build(stage: Stage, storms: Storms, options: dict[str, int]) -> nn.Module:
    """The model of a stage, with the same weights everywhere; on a mesh it is made parallel."""
    where = storms.where
    torch.manual_seed(0)
    c_given, c_out = len(stage.later + stage.now), len(stage.target)
    model = dit.Denoiser(storms.shape, c_given, c_out, **options).to(where.device, where.dtype)
    if where.mesh is not None:
        fsdp = "data" if where.mesh["data"].size() > 1 else None
        st.parallelize(model, where.mesh, data="data", fsdp=fsdp)
    return model


def train(
    name: str, storms: Storms, *, steps: int, batch: int, frames: int, rate: float = 2e-3,
    options: dict[str, int] | None = None,
) -> tuple[nn.Module, list[float]]:  # fmt: skip
    """A stage's model, with an exponential mean (EMA) of its weights, and the loss of every step.

    frames: so many from the first on are trained on. options: of the model.
    """
    stage, where = STAGES[name], storms.where
    model = build(stage, storms, options or {})
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 20) * (1 + math.cos(math.pi * i / steps)) / 2
    )
    mean = [p.detach().clone() for p in model.parameters()]
    losses = []
    for step in range(steps):
        first = ((list(STAGES).index(name) + 1) * 10**5 + step) * 10**3
        order = torch.Generator().manual_seed(first)
        now = where.share(torch.randint(frames - 1, (batch,), generator=order).tolist())
        sigma = dit.P_MEAN + dit.P_STD * torch.randn(batch, generator=order, dtype=torch.float64)
        sigma = where.share(sigma.exp()).to(where.device, where.dtype)
        noise = storms.noise(where.share(range(first + 1, first + 1 + batch)), len(stage.target))
        y = storms.read(stage.target, [f + 1 for f in now])
        optimizer.zero_grad()
        loss = dit.edm_loss(model, y, storms.given(stage, now), sigma, noise)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(mean_over_data(loss.item(), where))
        with torch.no_grad():
            for m, p in zip(mean, model.parameters(), strict=True):
                m.lerp_(p, 1 - min(0.98, (1 + step) / (10 + step)))
    load(model, mean)
    return model, losses


def mean_over_data(value: float, where: Where) -> float:
    if where.mesh is None:
        return value
    total = torch.tensor(value, device=where.device, dtype=torch.float64)
    dist.all_reduce(total, group=where.mesh.get_group("data"))
    return total.item() / where.mesh["data"].size()


@torch.no_grad()
def load(model: nn.Module, weights: Sequence[Tensor]) -> None:
    """Give the model these weights, whole ones or sharded as its own."""
    for p, w in zip(model.parameters(), weights, strict=True):
        if isinstance(p, DTensor) and not isinstance(w, DTensor):
            w = distribute_tensor(w.to(p.device), p.device_mesh, p.placements)
        p.copy_(w)


def forecast(
    models: dict[str, nn.Module], storms: Storms, frame: int, members: int, **how: float
) -> Tensor:
    """Samples (members, FIELDS, H, W) of what follows a frame, in the fields' units; whole.

    The satellite image is sampled first, and given to the radar's model.
    """
    mine = storms.where.share(range(members))
    found: list[Tensor] = []
    for k, (name, stage) in enumerate(STAGES.items()):
        given = storms.given(stage, [frame] * len(mine), *found)

        def noise(i: int, k: int = k, channels: int = len(stage.target)) -> Tensor:
            return storms.noise([10**9 + k * 10**6 + m * 10**3 + i for m in mine], channels)

        found.append(dit.heun(models[name], given, noise, **how))
    return physical(torch.cat(found, 1), storms)


def physical(x: Tensor, storms: Storms) -> Tensor:
    """Scaled FIELDS (B, FIELDS, H, W) in their units: all ranks' samples, whole, on the CPU."""
    whole = x.full_tensor() if isinstance(x, st.ShardTensor) else x
    if storms.where.mesh is not None:
        data = storms.where.mesh["data"]
        parts = [torch.empty_like(whole) for _ in range(data.size())]
        dist.all_gather(parts, whole.contiguous(), group=data.get_group())
        whole = torch.cat(parts)
    mean, std = torch.tensor([storms.scale(n) for n in FIELDS], dtype=torch.float64).T
    return (whole.cpu() * std[:, None, None] + mean[:, None, None]).to(whole.dtype)


def run(where: Where, args: argparse.Namespace) -> dict[str, Any]:
    """Train both models and sample; on a mesh also with the weights that one device found."""
    storms, begin, used = Storms(args.data_file, where), time.perf_counter(), args.frames * 4 // 5
    how = dict(steps=args.steps, batch=args.batch, frames=used)
    models, losses = {}, {}
    for name in STAGES:
        models[name], losses[name] = train(name, storms, **how)
    frame = (used + args.frames) // 2
    shown = partial(forecast, models, storms, frame, args.members, churn=args.churn)
    found = {"settings": settings(args), "losses": losses, "samples": shown()}
    found["seconds"] = time.perf_counter() - begin
    if where.mesh is None:
        found["truth"] = physical(storms.read(list(FIELDS), [frame + 1]), storms)[0]
        found["weights"] = {k: [p.data.cpu() for p in m.parameters()] for k, m in models.items()}
    elif (one := single(args)) is not None:
        for name, model in models.items():
            load(model, one["weights"][name])
        found["same_weights"] = shown()
    return found


def settings(args: argparse.Namespace) -> dict[str, Any]:
    names = "resolution", "frames", "steps", "batch", "members", "churn"
    return {n: getattr(args, n) for n in names}


def single(args: argparse.Namespace) -> dict[str, Any] | None:
    """What one device found, if it did; raises ValueError where its settings were others."""
    path = args.out / "storm_single.pt"
    found = torch.load(path) if path.exists() else None
    if found and found["settings"] != settings(args):
        raise ValueError(f"{path} is of {found['settings']}: run with --plain again, or remove it")
    return found


def report(one: dict[str, Any], many: dict[str, Any], out: Path) -> None:
    """Write CSV files of losses and of the samples' differences, and print what they come to.

    The largest difference of samples is relative to a field's largest deviation from its mean.
    """
    losses, samples = [], []
    for name in STAGES:
        pairs = zip(one["losses"][name], many["losses"][name], strict=True)
        here = [(name, i, a, b, abs(a - b) / a) for i, (a, b) in enumerate(pairs)]
        losses += here
        early, ever = (max(r[4] for r in rows) for rows in (here[:10], here))
        print(f"{name} loss: relative difference {early:.1e} in 10 steps, {ever:.1e} in all")
    for i, name in enumerate(FIELDS):
        a = one["samples"][:, i]
        differences = [(many[k][:, i] - a).abs().max() for k in ("same_weights", "samples")]
        both = [(d / (a - a.mean()).abs().max()).item() for d in differences]
        samples.append((name, *both))
        print(f"sampled {name}: relative difference {both[0]:.1e} with the same weights, "
              f"{both[1]:.1e} with those of its own training")  # fmt: skip
    print(f"{one['seconds']:.0f} s on one device, {many['seconds']:.0f} s on {many['ranks']} ranks")
    for file, header, rows in (
        ("storm_losses.csv", ("stage", "step", "one_device", "sharded", "relative"), losses),
        ("storm_samples.csv", ("field", "same_weights", "own_training"), samples),
    ):
        with (out / file).open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])


def draw(one: dict[str, Any], many: dict[str, Any], storms: Storms, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {"brightness_temperature": "gray_r", "vorticity": "RdBu_r", "reflectivity": "turbo"}
    y, x = (torch.from_numpy(storms.root[n][:]) for n in ("latitude", "longitude"))
    titles = "truth", "sample on one device", f"sample on {many['ranks']} ranks", "|difference|"
    plt.rcParams.update({"font.size": 8})
    upper, lower = plt.figure(figsize=(11, 10.4), layout="constrained").subfigures(
        2, height_ratios=[3.4, 1]
    )
    grid = upper.subplots(3, 4, sharex=True, sharey=True)
    for axes, (name, colours) in zip(grid, shown.items(), strict=True):
        i = list(FIELDS).index(name)
        truth, a, b = one["truth"][i], one["samples"][0, i], many["same_weights"][0, i]
        low = -truth.abs().max() if name == "vorticity" else truth.min()
        style = dict(cmap=colours, vmin=low, vmax=-low if name == "vorticity" else truth.max())
        units = FIELDS[name][0].replace("-1", "$^{-1}$")
        for column, field in enumerate((truth, a, b, (a - b).abs())):
            options = style if column < 3 else dict(cmap="magma", vmin=0)
            image = axes[column].pcolormesh(x, y, field, rasterized=True, **options)
            axes[column].set_aspect(1 / math.cos(math.radians(y.mean())))
            if column >= 2:
                upper.colorbar(image, ax=axes[:3] if column == 2 else axes[3], label=units)
        axes[0].set_ylabel(f"{name.replace('_', ' ')}\nlatitude (degrees)")
        for at, cut, line in ((y, 2, axes[2].axhline), (x, 3, axes[2].axvline)):
            for edge in many["cuts"][cut]:
                line((at[edge - 1] + at[edge]) / 2, color="lime", lw=1.2, ls="--")
    for top, bottom, title in zip(grid[0], grid[2], titles, strict=True):
        top.set_title(title, size=10)
        bottom.set_xlabel("longitude (degrees)")
    for axis, name in zip(lower.subplots(1, 2), STAGES, strict=True):
        axis.semilogy(one["losses"][name], color="C0", lw=3, alpha=0.5, label="one device")
        axis.semilogy(many["losses"][name], "k--", lw=0.8, label=f"{many['ranks']} ranks")
        axis.set(title=f"EDM loss of the {name} model", xlabel="step")
        axis.legend()
    lower.figure.savefig(path, dpi=80)


def worker(args: argparse.Namespace) -> None:
    """One of a launcher's processes, or the only one."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if args.plain:
        where = Where(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    else:
        mesh, device = st.init(data=args.data, h=-1, w=args.columns)
        where = Where(device, mesh)
    first = args.plain or dist.get_rank() == 0
    if first and not args.data_file.exists():
        generate(args.data_file, (args.resolution, args.resolution), args.frames)
    if not args.plain:
        dist.barrier()
    found = run(where, args)
    if not first:
        return
    if not args.plain:
        spec = where.spec((1, 1, args.resolution, args.resolution))
        found["cuts"] = {d: spec.dims[d].offsets[1:-1] for d in (2, 3)}
        found["ranks"] = dist.get_world_size()
    torch.save(found, args.out / f"storm_{'single' if args.plain else 'sharded'}.pt")
    if "same_weights" in found:
        one = single(args)
        report(one, found, args.out)
        draw(one, found, Storms(args.data_file, where), args.out / "storm_diffusion.png")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default, text in (
        ("ranks", torch.cuda.device_count() or 2, "processes to start"),
        ("data", 1, "ranks along the batch"),
        ("columns", 1, "ranks along W; the rest: along H"),
        ("resolution", 64, "points along H and W"),
        ("frames", 200, "of the data, half an hour apart; the last fifth is not trained on"),
        ("steps", 160, "of training, for each model"),
        ("batch", 4, "samples in a step"),
        ("members", 2, "samples to draw in the end"),
        ("churn", 0.0, "S_churn of the sampler; 0: no fresh noise"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument("--plain", action="store_true", help="one device, no sharding")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True, parents=True)
    args.data_file = args.out / f"storms_{args.resolution}_{args.frames}.zarr"
    if args.plain or place().launcher != "none":
        return worker(args)
    # one thread each: one core against one core for each rank
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    me = [__file__, *sys.argv[1:]]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    for command in ([*me, "--plain"], [*launcher, *me]):
        if subprocess.run([sys.executable, *command], env=env).returncode:
            sys.exit(f"failed: {' '.join(command)}")
    print(f"picture: {args.out / 'storm_diffusion.png'}")


if __name__ == "__main__":
    main()

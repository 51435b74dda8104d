"""Aerodynamics on irregular points: Transolvers learn pressure and velocity around vehicles.

    python examples/vehicle_aero.py [--seeds 5]
    torchrun --nproc-per-node 8 examples/vehicle_aero.py          # the sharded part only
    python examples/vehicle_aero.py --data FOLDER --layout drivaerml   # or shapenet-car, airfrans

Makes potential flows around 16 bodies (panels.py), in DrivAerML's layout. A Transolver learns the
pressure coefficient on the surface, a geometry-aware one the velocity in the volume, each on one
device and on 2 processes with points along a space-filling curve, cut unevenly. Writes
out/vehicle_aero.png and out/vehicle_aero.csv: relative L2 errors on bodies not trained on, of both.

The setting is that of Fig. 5 of arXiv 2605.11111.
"""

import argparse
import csv
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from panels import generate
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transolver import Transolver

import shardtensor as st
from shardtensor.io import Points, cases, convert
from shardtensor.ranks.workers import Pool
from shardtensor.train.launch import place

# of each layout: where the fields are, and the names of a surface's and a volume's field
FIELDS = {
    "drivaerml": ("cells", "CpMeanTrim", "UMeanTrim"),
    "shapenet-car": ("points", "point_scalars", "point_vectors"),
    "airfrans": ("points", "p", "U"),
}
TASKS = {"surface": "pressure on the surface", "volume": "velocity in the volume"}


@dataclass(frozen=True)
class Setting:
    """What to train. most: points of a cloud that a step sees; every: steps between tests."""

    folders: tuple[Path, ...]
    steps: int = 200
    every: int = 20
    tested: int = 4
    most: int = 2000
    double: bool = False


def prepared(root: Path, layout: str) -> tuple[Path, ...]:
    """Arrays of every case, as rows along a space-filling curve; converted once."""
    on, pressure, velocity = FIELDS[layout]
    folders = []
    for case in cases(root, layout):
        for kind, field in (("surface", pressure), ("volume", velocity)):
            convert(
                case[kind], case["folder"] / kind, on=on, fields=[field], rename={field: "field"}
            )
        folders.append(case["folder"])
    return tuple(folders)


class Clouds:
    """Samples of a task: (features, geometry or None, field), each (1, N, C), rows sharded.

    Coordinates are scaled by the first body's, the field by the training bodies' mean and
    deviation. mesh: None: whole, on one device.
    """

    def __init__(self, setting: Setting, task: str, mesh: DeviceMesh | None, shares: Any) -> None:
        self.task, self.dtype = task, torch.float64 if setting.double else torch.float32
        self.whole = mesh is None
        # one rank reads all rows
        mesh = init_device_mesh("cpu", (1,)) if mesh is None else mesh
        options: dict[str, Any] = dict(most=setting.most, shares=shares)
        self.surface = Points([f / "surface" for f in setting.folders], mesh, **options)
        self.volume = Points([f / "volume" for f in setting.folders], mesh, **options)
        first = self.read(self.surface[0]["coordinates"])
        self.middle, self.size = first.mean(1, keepdim=True), first.std()
        fields = [self.field(i) for i in range(len(setting.folders) - setting.tested)]
        self.mean = sum(f.mean(1, keepdim=True) for f in fields) / len(fields)
        self.deviation = (sum((f - self.mean).square().mean() for f in fields) / len(fields)).sqrt()

    def read(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)[None]
        return x.full_tensor() if self.whole else x

    def field(self, i: int) -> Tensor:
        x = self.read((self.surface if self.task == "surface" else self.volume)[i]["field"])
        return x[..., None] if x.ndim == 2 else x

    def features(self, sample: dict[str, Tensor]) -> Tensor:
        """Coordinates, and where there are normals, those."""
        x = (self.read(sample["coordinates"]) - self.middle) / self.size
        return torch.cat([x, self.read(sample["normals"])], -1) if "normals" in sample else x

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor | None, Tensor]:
        surface = self.features(self.surface[i])
        field = (self.field(i) - self.mean) / self.deviation
        if self.task == "surface":
            return surface, None, field
        return self.features(self.volume[i]), surface, field

    def network(self) -> nn.Module:
        x, geometry, field = self[0]
        c = 0 if geometry is None else geometry.shape[-1]
        return Transolver(x.shape[-1], field.shape[-1], c).to(self.dtype)


def train(
    setting: Setting, task: str, seed: int, mesh: DeviceMesh | None = None, shares: Any = None
) -> tuple[list[float], list[float]]:
    """(loss of every step, relative L2 error on the test bodies every few steps)."""
    data = Clouds(setting, task, mesh, shares)
    torch.manual_seed(seed)
    model = data.network()
    if mesh is not None:
        st.parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, setting.steps)
    n = len(setting.folders) - setting.tested
    order = torch.Generator().manual_seed(seed)
    losses, errors = [], []
    for step in range(setting.steps):
        if step % setting.every == 0:
            errors.append(error(model, data, range(n, len(setting.folders))))
        x, geometry, field = data[int(torch.randint(n, (), generator=order))]
        loss = (model(x, geometry) - field).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
        losses.append(loss.item())
    errors.append(error(model, data, range(n, len(setting.folders))))
    return losses, errors


@torch.no_grad()
def error(model: nn.Module, data: Clouds, bodies: Sequence[int]) -> float:
    """|prediction - field| / |field - mean|, mean over bodies."""
    found = []
    for i in bodies:
        x, geometry, field = data[i]
        gap = model(x, geometry) - field
        found.append((gap.square().sum() / field.square().sum()).sqrt().item())
    return sum(found) / len(found)


def sharded(setting: Setting, task: str, seed: int) -> tuple[list[float], list[float]]:
    """The same on all ranks, of which the first has as many points as all others together."""
    n = dist.get_world_size()
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (n,))
    return train(setting, task, seed, mesh, [n - 1 or 1, *[1] * (n - 1)])


def alone(setting: Setting, task: str, seed: int) -> tuple[list[float], list[float]]:
    """On one device."""
    return train(setting, task, seed)


def sign_flips(differences: Sequence[float]) -> float:
    """p of paired differences around zero: the share of all signs that give as large a mean."""
    mean = abs(sum(differences))
    every = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in every]
    return sum(s >= mean * (1 - 1e-12) for s in sums) / len(every)


def draw(found: dict[tuple[str, int, str], Any], setting: Setting, ranks: int, path: Path) -> None:
    """Test errors against steps, both ways, for each task; thin lines are further seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(TASKS), figsize=(10, 3.8), layout="constrained")
    for ax, (task, title) in zip(axes, TASKS.items(), strict=True):
        for (name, seed, how), (_, errors) in found.items():
            if name == task:
                one = how == "one device"
                steps = [min(i * setting.every, setting.steps) for i in range(len(errors))]
                ax.semilogy(
                    steps, errors, "-" if one else "o--", ms=3, lw=5 if one else 1,
                    color="#c9d8ea" if one else f"C{seed}",
                    label=(how if one else f"{ranks} ranks") if seed == 0 else None,
                )  # fmt: skip
        ax.set(title=title, xlabel="step", ylabel="relative L2 error on test bodies")
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(found: dict[tuple[str, int, str], Any], seeds: int, ranks: int) -> None:
    """What the two ways differ by, beside what seeds differ by."""
    for task, title in TASKS.items():
        pairs = [
            (found[task, s, "one device"][1], found[task, s, "sharded"][1]) for s in range(seeds)
        ]
        last = [(a[-1], b[-1]) for a, b in pairs]
        apart = max(abs(x - y) / x for a, b in pairs for x, y in zip(a, b, strict=True))
        print(
            f"{title}: error {last[0][0]:.4f} on one device, {last[0][1]:.4f} on {ranks} ranks; "
            f"largest relative difference {apart:.1e}"
        )
        if seeds > 1:
            finals = torch.tensor([a for a, _ in last], dtype=torch.float64)
            gaps = [b - a for a, b in last]
            print(
                f"  {seeds} seeds: {finals.mean():.4f} +- {finals.std():.4f}; sharded minus one "
                f"device {sum(gaps) / seeds:+.1e}, p = {sign_flips(gaps):.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="cases on disk, instead of making some")
    parser.add_argument("--layout", default="drivaerml", choices=list(FIELDS))
    parser.add_argument("--bodies", type=int, default=16)
    parser.add_argument("--level", type=int, default=3, help="20 * 4^level panels")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--most", type=int, default=2000, help="points of a cloud")
    parser.add_argument("--tested", type=int, default=4, help="bodies that are not trained on")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--double", action="store_true", help="float64")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    root = options.data or options.out / f"vehicles{options.level}"
    parallel = place().ranks > 1
    if parallel:
        st.init()
    if options.data is None and (not parallel or dist.get_rank() == 0):
        generate(root, options.bodies, options.level, 20 * 4**options.level)
    if parallel:
        dist.barrier()
    setting = Setting(
        prepared(root, options.layout), options.steps, max(1, options.steps // 10),
        options.tested, options.most, options.double,
    )  # fmt: skip
    if parallel:
        for task, title in TASKS.items():
            errors = sharded(setting, task, 0)[1]
            if dist.get_rank() == 0:
                print(f"{title}: error {errors[0]:.4f} to {errors[-1]:.4f}", flush=True)
        return
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    one, many = Pool(1), Pool(options.ranks)
    found: dict[tuple[str, int, str], Any] = {}
    for task, seed in itertools.product(TASKS, range(options.seeds)):
        found[task, seed, "one device"] = one.run(alone, setting, task, seed)[0]
        found[task, seed, "sharded"] = many.run(sharded, setting, task, seed)[0]
    one.close()
    many.close()
    report(found, options.seeds, options.ranks)
    rows = [
        [task, seed, how, i * setting.every, e]
        for (task, seed, how), (_, errors) in found.items()
        for i, e in enumerate(errors)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "vehicle_aero.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["task", "seed", "on", "step", "error"], *rows])
    draw(found, setting, options.ranks, options.out / "vehicle_aero.png")
    print(f"wrote {options.out / 'vehicle_aero.csv'} and {options.out / 'vehicle_aero.png'}")


if __name__ == "__main__":
    main()

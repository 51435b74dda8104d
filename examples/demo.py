"""Does training on a sharded sample give the numbers of one device? `make demo` shows it.

Simulates 2-D turbulence, trains a U-Net and a ViT on one device and on 2 processes (or all GPUs),
and holds the two against each other: a table, and a picture in out/demo.png.

    python examples/demo.py [--ranks N] [--resolution N] [--steps N] [--out DIR]
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from navier_stokes import generate
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).parent


def run(command, threads):
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if subprocess.run([sys.executable, *map(str, command)], env=env).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


def largest_difference(a, b):
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def mib(n):
    return f"{n / 2**20:.1f}"


def report(console, single, sharded, ranks):
    for name, one in single.items():
        many = sharded[name]
        table = Table(title=f"{name}, {one['parameters']:,} parameters: loss of every step")
        for column in ("step", "one device", f"{ranks} ranks", "relative difference"):
            table.add_column(column, justify="right")
        for i, (a, b) in enumerate(zip(one["losses"], many["losses"], strict=True)):
            table.add_row(str(i), f"{a:.7f}", f"{b:.7f}", f"{abs(a - b) / abs(a):.1e}")
        console.print(table)
    table = Table(title="one device / each rank")
    for column in ("model", "largest relative loss difference", "peak of a step, MiB",
                   "kept for backward, MiB", "read, MiB", "median step, ms"):  # fmt: skip
        table.add_column(column, justify="right")
    for name, one in single.items():
        many = sharded[name]
        table.add_row(
            name,
            f"{largest_difference(many['losses'], one['losses']):.1e}",
            f"{mib(one['peak'])} / {mib(many['peak'])}",
            f"{mib(one['saved'])} / {mib(many['saved'])}",
            f"{mib(one['bytes_read'])} / {mib(many['bytes_read'])}",
            f"{1e3 * one['seconds']:.0f} / {1e3 * many['seconds']:.0f}",
        )
    console.print(table)


def draw(single, sharded, path):
    figure, grid = plt.subplots(len(single), 3, figsize=(11, 3.6 * len(single)), squeeze=False)
    for row, (name, one) in zip(grid, single.items(), strict=True):
        many = sharded[name]
        field, prediction = many["fields"]
        error = (prediction - one["fields"][1]).abs()
        limit = float(field.abs().max())
        edges = torch.tensor(many["cuts"]).cumsum(0)[:-1].tolist()
        panels = [
            ("input vorticity", field, "RdBu_r", -limit, limit),
            (f"{name}: predicted next frame", prediction, "RdBu_r", -limit, limit),
            ("|sharded model - single-device model|", error, "magma", 0, None),
        ]
        for axis, (title, values, colours, low, high) in zip(row, panels, strict=True):
            image = axis.imshow(values, cmap=colours, vmin=low, vmax=high)
            for rank, edge in enumerate(edges):
                axis.axhline(edge - 0.5, color="black" if low else "white", lw=1.2, ls="--")
                axis.text(2, edge - 2.5, f"rank {rank}", color="black" if low else "white", size=7)
                axis.text(
                    2, edge + 5, f"rank {rank + 1}", color="black" if low else "white", size=7
                )
            axis.set_title(title, size=9)
            axis.set_xticks([])
            axis.set_yticks([])
            figure.colorbar(image, ax=axis, shrink=0.85)
    figure.suptitle(f"One sample on {len(many['cuts'])} ranks, trained to the same model as on one")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--trajectories", type=int, default=4)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True, parents=True)
    console = Console()
    data = args.out / f"navier_stokes_{args.resolution}.hdf5"
    if not data.exists():
        with Progress(console=console) as bar:
            task = bar.add_task("simulating turbulence", total=None)
            generate(
                data, args.resolution, args.trajectories, args.frames,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
    train = HERE / "train.py"
    common = [train, "--data", data, "--steps", args.steps, "--out"]
    # one thread each: the times compare one core with one core per rank
    run([*common, args.out / "single.pt", "--plain"], threads=1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.ranks]
    run([*launcher, *common, args.out / "sharded.pt"], threads=1)
    single = torch.load(args.out / "single.pt")
    sharded = torch.load(args.out / "sharded.pt")
    report(console, single, sharded, args.ranks)
    draw(single, sharded, args.out / "demo.png")
    console.print(f"picture: {args.out / 'demo.png'}")


if __name__ == "__main__":
    main()

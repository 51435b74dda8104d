"""A gallery: many families of models, each trained on one device and on 2 processes.

    python examples/gallery.py [--families fno2d graph ...] [--steps 300] [--double]
    torchrun --nproc-per-node 4 examples/gallery.py      # the sharded part only, on all ranks

Both trainings see the same data. Shards are uneven: of two, the first has two thirds. Writes
out/gallery.png and out/gallery.csv: the losses of both, which lie on each other, and by how much
they differ. The models are in gallery_models.py and import nothing of shardtensor.
"""

import argparse
import csv
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gallery_models as models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh
from shardtensor.ranks.workers import Pool
from shardtensor.train.launch import place


@st.rule("gallery_models.submanifold_conv")
def submanifold_conv(features: Tensor, coords: Tensor, weight: Tensor) -> Tensor:
    """The model's sparse convolution on shards."""
    return st.sparse.submanifold_conv(features, coords, weight, 3)


# a tensor and the dim to shard, None: whole on every rank
Part = tuple[Tensor, int | None]


@dataclass(frozen=True)
class Family:
    """A model, and for each step (its inputs, the target of its output). Numbers are float64."""

    title: str
    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[list[Part], Part]]


def waves(g: torch.Generator, shape: Sequence[int], decay: float = 1.5) -> Tensor:
    """A smooth periodic random field (1, 1, *shape) of deviation 1."""
    noise = torch.randn(*shape, generator=g, dtype=torch.float64)
    spectrum = torch.fft.fftn(noise) * (1 + squares(shape)) ** -decay
    field = torch.fft.ifftn(spectrum).real
    return (field / field.std())[None, None]


def squares(shape: Sequence[int]) -> Tensor:
    """|k|^2 of every mode."""
    axes = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) ** 2 for n in shape]
    return sum(a.view([-1 if i == d else 1 for i in range(len(shape))]) for d, a in enumerate(axes))


def denoising(g: torch.Generator) -> tuple[list[Part], Part]:
    """A field and noise; the field."""
    field = waves(g, (12, 16, 16))
    sigma = torch.exp(0.4 * torch.randn(1, generator=g, dtype=torch.float64))
    noise = torch.randn(field.shape, generator=g, dtype=torch.float64)
    return [(field + sigma * noise, 2), (sigma, None)], (field, 2)


def diffusion(shape: Sequence[int]) -> Callable[[torch.Generator], tuple[list[Part], Part]]:
    """A periodic field; the same after it was moved and has spread, exactly."""

    def batch(g: torch.Generator) -> tuple[list[Part], Part]:
        field = waves(g, shape)
        after = torch.fft.fftn(field[0, 0]) * torch.exp(-0.02 * squares(shape))
        after = torch.fft.ifftn(after).real.roll(2, 0)
        return [(field, 2)], (after[None, None], 2)

    return batch


def on_the_sphere(g: torch.Generator) -> tuple[list[Part], Part]:
    """A field on a sphere; the same after it has spread and turned, exactly."""
    from torch_harmonics import InverseRealSHT, RealSHT

    n, m = 16, 32
    there, back = RealSHT(n, m).double(), InverseRealSHT(n, m).double()
    spectrum = there(torch.randn(1, 1, n, m, generator=g, dtype=torch.float64))
    degree = torch.arange(spectrum.shape[-2], dtype=torch.float64)[:, None]
    order = torch.arange(spectrum.shape[-1], dtype=torch.float64)
    spectrum = spectrum / (1 + degree)
    turned = spectrum * torch.exp(-0.02 * degree * (degree + 1)) * torch.exp(0.4j * order)
    field, after = back(spectrum), back(turned)
    return [(field / field.std(), 2)], (after / field.std(), 2)


def heat(g: torch.Generator, n: int = 200, k: int = 5) -> tuple[list[Part], Part]:
    """Temperatures on random points of a square, and the edges to their nearest; a step later."""
    points = torch.rand(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # near points on near ranks
    points = points[points[:, 0].sort().indices]
    distance, near = torch.cdist(points, points).topk(k + 1, largest=False)
    target = torch.arange(n).repeat_interleave(k)
    source, length = near[:, 1:].flatten(), distance[:, 1:].flatten()
    gap = (points[source] - points[target]) / length.mean()
    features = torch.cat([gap, (length / length.mean())[:, None]], 1)
    u = torch.zeros(n, 1, dtype=torch.float64)
    for _ in range(4):
        k1, k2 = 6 * torch.rand(2, generator=g, dtype=torch.float64)
        u = u + torch.sin(k1 * points[:, :1] + k2 * points[:, 1:])
    after = u + 0.1 * torch.zeros_like(u).index_add(0, target, u[source] - u[target])
    return [(u, 0), (torch.stack([source, target]), 1), (features, 0)], (after, 0)


def around_bodies(g: torch.Generator, n: int = 240, m: int = 160) -> tuple[list[Part], Part]:
    """Points on an ellipsoid, and around it; the potential of a charge spread over the surface."""
    axes = 0.3 + 0.4 * torch.rand(3, generator=g, dtype=torch.float64)
    unit = F.normalize(torch.randn(n, 3, generator=g, dtype=torch.float64), dim=1)
    surface = unit * axes
    queries = 2 * torch.rand(m, 3, generator=g, dtype=torch.float64) - 1
    potential = 1 / (torch.cdist(queries, surface) ** 2 + 0.01).sqrt()
    return [(queries, 0), (surface, 0)], (potential.mean(1, keepdim=True), 0)


def shells(g: torch.Generator, n: int = 16) -> tuple[list[Part], Part]:
    """The cells that a sphere passes through; the direction outward."""
    centre = 5 + 6 * torch.rand(3, generator=g, dtype=torch.float64)
    radius = 3 + 2 * torch.rand((), generator=g, dtype=torch.float64)
    grid = torch.cartesian_prod(*[torch.arange(n)] * 3)
    away = grid - centre
    coords = grid[(away.norm(dim=1) - radius).abs() < 0.6]
    ones = torch.ones(len(coords), 1, dtype=torch.float64)
    return [(ones, 0), (coords, 0)], (F.normalize(coords - centre, dim=1), 0)


FAMILIES = {
    "unet3d": Family("diffusion U-Net 3-D: denoising", models.UNet3d, denoising),
    "fno2d": Family(
        "FNO 2-D: motion and diffusion", lambda: models.FNO((6, 6)), diffusion((32, 32))
    ),
    "fno3d": Family(
        "FNO 3-D: motion and diffusion", lambda: models.FNO((4, 4, 4)), diffusion((12, 12, 12))
    ),
    "sphere": Family(
        "spherical FNO: diffusion and turning", lambda: models.SphericalFNO((16, 32)), on_the_sphere
    ),
    "graph": Family("mesh graph net: heat on a mesh", models.MeshGraphNet, heat),
    "points": Family("point model: potential of a body", models.PointModel, around_bodies),
    "sparse": Family("sparse convolutions: normals", models.SparseNet, shells),
}


def cut(size: int, ranks: int) -> list[int]:
    """Uneven sizes: the first two thirds, the others alike."""
    rest = size // 3
    others = [rest // max(1, ranks - 1)] * (ranks - 1)
    return [size - sum(others), *others]


def put(part: Part, mesh: DeviceMesh | None, dtype: torch.dtype) -> Tensor:
    """A tensor, or this rank's shard of it."""
    x, dim = part
    x = x.to(dtype) if x.is_floating_point() else x
    if mesh is None or dim is None:
        return x
    sizes = {dim: cut(x.shape[dim], mesh.size())}
    return st.distribute_tensor(x, mesh, [Shard(dim)], src_data_rank=None, sizes=sizes)


def train(name: str, steps: int, dtype: torch.dtype, mesh: DeviceMesh | None = None) -> list[float]:
    """The losses of a family's training."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.make().to(dtype)
    if mesh is not None:
        st.parallelize(model, mesh)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(steps):
        inputs, target = family.batch(torch.Generator().manual_seed(step))
        loss = F.mse_loss(model(*(put(p, mesh, dtype) for p in inputs)), put(target, mesh, dtype))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharded(name: str, steps: int, dtype: torch.dtype) -> list[float]:
    """The same on all ranks."""
    return train(name, steps, dtype, make_mesh((dist.get_world_size(),)))


def difference(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest relative one of two curves."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def draw(found: dict[str, tuple[list[float], list[float]]], ranks: int, path: Path) -> None:
    """A panel for each family: both curves, smoothed, and how far the raw ones are apart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(found))
    rows = math.ceil(len(found) / columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 3.0 * rows), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(found) :]:
        ax.axis("off")
    for ax, (name, (one, many)) in zip(axes.flat, found.items(), strict=False):
        width = max(1, len(one) // 20)
        smooth = torch.ones(1, 1, width, dtype=torch.float64) / width
        curves = [
            F.conv1d(torch.tensor([[c]], dtype=torch.float64), smooth)[0, 0] for c in (one, many)
        ]
        ax.semilogy(curves[0], lw=3.5, color="#c9d8ea", label="one device")
        ax.semilogy(curves[1], lw=1, color="#a8516e", label=f"{ranks} ranks")
        ax.set_title(FAMILIES[name].title, fontsize=9)
        ax.text(0.97, 0.95, f"largest difference {difference(many, one):.0e}", ha="right", va="top",
                transform=ax.transAxes, fontsize=8)  # fmt: skip
        ax.set_xlabel("step", fontsize=8)
        ax.tick_params(labelsize=7, which="both")
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel(f"loss, mean of {width} steps", fontsize=8)
    axes[0, 0].legend(fontsize=8, loc="lower left")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--double", action="store_true", help="float64")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    dtype = torch.float64 if options.double else torch.float32
    if place().ranks > 1:
        mesh, _ = st.init()
        for name in options.families:
            losses = train(name, options.steps, dtype, mesh)
            if dist.get_rank() == 0:
                print(f"{FAMILIES[name].title:38} {losses[0]:.4f} to {losses[-1]:.4f}", flush=True)
        return
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = Pool(options.ranks)
    found = {}
    for name in options.families:
        begin = time.perf_counter()
        one = train(name, options.steps, dtype)
        middle = time.perf_counter()
        many = pool.run(sharded, name, options.steps, dtype)[0]
        end = time.perf_counter()
        found[name] = one, many
        print(f"{FAMILIES[name].title:38} loss {one[0]:.4f} to {one[-1]:.4f}; largest relative "
              f"difference {difference(many, one):.1e}; {middle - begin:.0f} s and "
              f"{end - middle:.0f} s", flush=True)  # fmt: skip
    pool.close()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[list[Any]] = [["family", "step", "one device", f"{options.ranks} ranks"]]
    for name, curves in found.items():
        rows += [[name, i, *pair] for i, pair in enumerate(zip(*curves, strict=True))]
    with (options.out / "gallery.csv").open("w", newline="") as f:
        csv.writer(f).writerows(rows)
    draw(found, options.ranks, options.out / "gallery.png")
    print(f"wrote {options.out / 'gallery.csv'} and {options.out / 'gallery.png'}")


if __name__ == "__main__":
    main()

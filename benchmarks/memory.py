"""Peak memory of a training step on each rank, over its share of the peak on one device.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--ranks 2 4] [--csv FILE]

Of the activations and gradients that forward and backward hold at once, parameters not counted.
1.00 is a perfect split. Kept: what the forward keeps for the backward, likewise.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.measure import peak_bytes, saved_bytes
from shardtensor.pool import Pool
from shardtensor.testing import make_mesh

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from models import UNet, ViT


class DiTBlock(nn.Module):
    """Attention and MLP, shifted and scaled by a condition (Peebles, Xie 2023, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.condition = nn.Linear(width, 6 * width)
        self.heads = heads

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a, b, g, d, e, h = self.condition(c).chunk(6, -1)
        y = self.norms[0](x) * (1 + a) + b
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + g * self.out(y)
        return x + h * self.mlp(self.norms[1](x) * (1 + d) + e)


class DiT(nn.Module):
    def __init__(self, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, width, 4, 4)
        self.blocks = nn.ModuleList(DiTBlock(width, 4) for _ in range(depth))
        self.condition = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, self.condition)
        return x


MODELS = {
    "U-Net": (lambda: UNet(4, 4, width=16), (2, 4, 256, 256)),
    "ViT": (lambda: ViT((256, 256), 8, 4, 4), (2, 4, 256, 256)),
    "DiT": (DiT, (2, 4, 192, 192)),
}


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)


def run(name: str) -> list[float]:
    """(peak, kept) in bytes of this rank; of one device in a world of one."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    n = dist.get_world_size()
    model, x = build(), torch.randn(shape)
    if n > 1:
        mesh = make_mesh((n,))
        st.parallelize(model, mesh)
        x = st.distribute_tensor(x, mesh, [Shard(2)])
    step(model, x)
    return [peak_bytes(lambda: step(model, x)), saved_bytes(lambda: model(x))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    pool = Pool(1)
    alone = {name: pool.run(run, name)[0] for name in MODELS}
    pool.close()
    columns = {"ranks": 5, "peak MiB": 10, "of share": 9, "kept MiB": 10, " of share": 9}
    print(f"{'model':8}", *(f"{name:>{width}}" for name, width in columns.items()))
    for n in options.ranks:
        pool = Pool(n)
        for name in MODELS:
            most = [max(r[i] for r in pool.run(run, name)) for i in range(2)]
            ratios = [m * n / a for m, a in zip(most, alone[name], strict=True)]
            print(
                f"{name:8} {n:5} {most[0] / 2**20:10.1f} {ratios[0]:9.2f} "
                f"{most[1] / 2**20:10.1f} {ratios[1]:9.2f}"
            )
            if options.csv:
                with options.csv.open("a", newline="") as f:
                    csv.writer(f).writerow([name, n, *most, *(f"{r:.3f}" for r in ratios)])
        pool.close()


if __name__ == "__main__":
    main()

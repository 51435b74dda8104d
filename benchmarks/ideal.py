"""How far a sharded run is from the ideal: the same work on a shard, without communication.

    OMP_NUM_THREADS=1 python benchmarks/ideal.py [--ranks 2] [--repeats 15] [--csv FILE]

Every rank is a process with one thread. The ideal is the plain model on an input of the shard's
size, run on all ranks at once, so that they share the memory's bandwidth as in the sharded run. The
two alternate and each begins at a barrier and ends with the last rank; printed is the median of
their ratios, forward alone and with backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tables import extend, hardware
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh
from shardtensor.ranks.workers import Pool


class Block(nn.Module):
    """Two convolutions with batch norm and a skip connection."""

    def __init__(self, n: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(n, n, 3, padding=1) for _ in range(2))
        self.inside = nn.Sequential(first, nn.BatchNorm2d(n), nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inside(x))


def convnet(n: int = 64, blocks: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, n, 3, padding=1), *(Block(n) for _ in range(blocks)))


class ViT(nn.Module):
    """Patches of 8, pre-norm blocks, no class token; positions by a convolution."""

    def __init__(self, width: int = 192, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        layer = lambda: nn.TransformerEncoderLayer(  # noqa: E731
            width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.blocks = nn.ModuleList(layer() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


# name -> (model, input shape, sharded dim). Attention and ViT do more work on a whole sequence than
# on half of it: their ideal attends to all keys
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "conv 3x3, 64 channels, 256x256": (lambda: conv(64, 3), (1, 64, 256, 256), 2),
    "conv 3x3, 64 channels, 512x512": (lambda: conv(64, 3), (1, 64, 512, 512), 2),
    "conv 7x7, 16 channels, 256x256": (lambda: conv(16, 7), (1, 16, 256, 256), 2),
    "conv 7x7, 16 channels, 768x768": (lambda: conv(16, 7), (1, 16, 768, 768), 2),
    "attention, 2048 tokens": (Attention, (1, 2048, 576), 1),
    "attention, 4096 tokens": (Attention, (1, 4096, 576), 1),
    "attention, 8192 tokens": (Attention, (1, 8192, 576), 1),
    "ConvNet, 64 channels, 4 blocks": (convnet, (1, 3, 256, 256), 2),
    "ViT, patch 8, width 192, depth 4": (ViT, (1, 3, 256, 256), 2),
    "the same ViT, 512x512": (ViT, (1, 3, 512, 512), 2),
}


def conv(n: int, kernel: int) -> nn.Module:
    return nn.Conv2d(n, n, kernel, padding=kernel // 2)


def ideal_attention(n: int) -> Callable[..., Tensor]:
    """Attention of a shard's queries to keys of the whole sequence, ready-made by repetition."""
    plain = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return plain(q, k.repeat(1, 1, n, 1), v.repeat(1, 1, n, 1), *args, **kwargs)

    return attend


def run(name: str, repeats: int) -> dict[str, Any]:
    """On this rank: seconds of (ideal, sharded), repeat by repeat, and what a step sends."""
    build, shape, dim = CASES[name]
    n = dist.get_world_size()
    torch.manual_seed(0)
    mesh = make_mesh((n,))
    model, twin = st.parallelize(build(), mesh), build()
    part = list(shape)
    part[dim] //= n
    local = torch.randn(part)
    x = st.ShardTensor.from_local(local, mesh, [Shard(dim)], sizes={dim: [part[dim]] * n})
    x, local = x.detach(), local.clone()
    for leaf in (x, local):
        leaf.requires_grad_()

    def timed(model: nn.Module, leaf: Tensor, backward: bool) -> float:
        dist.barrier()
        begin = time.perf_counter()
        with torch.set_grad_enabled(backward):
            y = model(leaf)
            if backward:
                y.sum().backward()
        return time.perf_counter() - begin

    plain = F.scaled_dot_product_attention
    found: dict[str, Any] = {}
    for kind in ("forward", "step"):
        pairs = []
        for i in range(repeats + 2):
            F.scaled_dot_product_attention = ideal_attention(n)
            ideal = timed(twin, local, kind == "step")
            F.scaled_dot_product_attention = plain
            sharded = timed(model, x, kind == "step")
            if i >= 2:
                pairs.append((ideal, sharded))
        found[kind] = pairs
    with st.trace() as t:
        model(x).sum().backward()
    found["messages"], found["MB"] = t.messages, t.bytes / 1e6
    return found


def summary(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of one case: a run is over when its last rank is."""
    row: dict[str, float] = {}
    for kind in ("forward", "step"):
        repeats = list(zip(*(r[kind] for r in ranks), strict=True))
        ended = [[max(times) for times in zip(*pairs, strict=True)] for pairs in repeats]
        row[f"{kind} ms"] = 1e3 * statistics.median(ideal for ideal, _ in ended)
        row[kind] = statistics.median(sharded / ideal for ideal, sharded in ended)
    for key in ("messages", "MB"):
        row[key] = max(r[key] for r in ranks)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    pool = Pool(options.ranks)
    print(f"{'case':36} {'ideal ms':>17} {'sharded / ideal':>17} {'a step sends':>20}")
    both = f"{'forward':>8} {'step':>8}"
    print(f"{'':36} {both} {both} {'messages':>9} {'MB':>10}")
    for name in CASES:
        if not name.startswith(options.only):
            continue
        row = summary(pool.run(run, name, options.repeats, timeout=600))
        print(
            f"{name:36} {row['forward ms']:8.1f} {row['step ms']:8.1f} {row['forward']:8.2f} "
            f"{row['step']:8.2f} {row['messages']:9.0f} {row['MB']:10.3f}",
            flush=True,
        )
        values = [f"{v:.4g}" for v in row.values()]
        extend(options.csv, [[name, options.ranks, *values, hardware()]])
    pool.close()


if __name__ == "__main__":
    main()

"""What a plan predicts of a step's time over what it takes, for ten models on one and two ranks.

    OMP_NUM_THREADS=1 python benchmarks/plan_times.py [--ranks 1 2] [--csv FILE] [NAME ...]

Measures this CPU first, as `shardtensor doctor` does, then each model's training step (AdamW): two
ranks share the first spatial dim. Predictions use nothing of the models' runs. It says where the
machine was busy while it measured; such figures mean little. About four minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_models import MODELS as KNOWN
from models import UNet, ViT
from tables import append
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.attention import assume
from shardtensor.observe.network import DGX_H100
from shardtensor.plan import rates as timing
from shardtensor.plan.calibrate import calibrated, is_busy, step_seconds
from shardtensor.plan.device import device_of
from shardtensor.plan.doctor import measure
from shardtensor.plan.estimate import Layout, Task, attention_rates, estimate
from shardtensor.ranks.testing import make_mesh
from shardtensor.ranks.workers import Pool

FIELDS = ["model", "ranks", "predicted ms", "measured ms", "ratio", "compute ms", "wire ms", "busy"]
AIM = 0.8, 1.25


class Residual(nn.Module):
    """Two convolutions and their norms, around which what comes in is added (He et al. 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.body(x)).relu()


class Next(nn.Module):
    """A wide depthwise convolution and an MLP over channels (Liu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


def resnet(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, width, 3, padding=1), *(Residual(width) for _ in range(4)))


def convnext(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, width, 4, 4), *(Next(width) for _ in range(4)))


def volume(width: int = 16) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv3d(2, width, 3, padding=1)]
    for _ in range(3):
        layers += [nn.GroupNorm(4, width), nn.SiLU(), nn.Conv3d(width, width, 3, padding=1)]
    return nn.Sequential(*layers)


class Mixer(nn.Module):
    """Linear layers, norms and functions of tokens, which no rank asks another for."""

    def __init__(self, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.permute(0, 2, 3, 1))
        for layer in self.layers:
            x = x + layer(x)
        return x


def _known(name: str) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    build, shape = KNOWN[name]
    return lambda: build(128), shape(128)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: _known(name) for name in KNOWN},
    "U-Net, wide": (lambda: UNet(4, 4, width=32), (1, 4, 192, 192)),
    "ViT, patch 4": (lambda: ViT((64, 128), 4, 4, 4), (1, 4, 64, 128)),
    "ResNet": (resnet, (1, 4, 128, 128)),
    "ConvNeXt": (convnext, (1, 4, 256, 256)),
    "CNN 3-D": (volume, (1, 2, 32, 32, 32)),
    "MLP": (Mixer, (1, 16, 64, 64)),
}


def measured(name: str, limits: Any) -> tuple[float, str]:
    """Seconds of a step on the slowest rank, in a process of the pool, and why it means little."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    n = dist.get_world_size()
    if n > 1:
        mesh = make_mesh((n,))
        st.parallelize(model, mesh)
        x = st.distribute_tensor(x, mesh, [Shard(2)])
    with assume(limits):
        seconds = step_seconds(model, x)
    return seconds, is_busy()


def links() -> Any:
    return measure(make_mesh((dist.get_world_size(),)))


def by_processor(_: Any = None) -> None:
    """From now on times of this process are those of the processor."""
    timing.clock = time.process_time


def rows(ranks: int, names: list[str], cpu: bool) -> list[dict[str, Any]]:
    """Of each model on so many ranks."""
    with processes(ranks, cpu) as pool:
        network = pool.run(links)[0].network() if ranks > 1 else DGX_H100
        found = calibrated(ranks, network, pool)
    for reason in found.why:
        print(f"the machine was busy while it was measured: {reason}")
    assert found.rates is not None
    device = device_of(found.rates)
    told = []
    for name in names:
        make, shape = MODELS[name]
        layout = Layout(1, (2,), (ranks,))
        plan = estimate(Task(make, [shape], dims=(2,)), layout, device, network)
        if plan.refused:
            raise RuntimeError(f"{name}: {plan.refused}")
        limits = attention_rates(device, network, ranks)
        # of its own: what ran before decides what memory a process has at hand
        with processes(ranks, cpu) as pool:
            seconds, busy = pool.run(measured, name, limits)[0]
        predicted = plan.seconds if ranks > 1 else plan.compute
        values = predicted, seconds, 0, plan.compute, plan.communication * (ranks > 1)
        row = dict(
            zip(FIELDS, [name, ranks, *(round(1e3 * v, 2) for v in values), busy], strict=True)
        )
        row["ratio"] = round(predicted / seconds, 3)
        print(", ".join(f"{k} {v}" for k, v in row.items() if v != ""), flush=True)
        told.append(row)
    return told


@contextmanager
def processes(ranks: int, cpu: bool) -> Iterator[Pool]:
    """New ones. cpu: whose times are those of the processor."""
    pool = Pool(ranks)
    try:
        if cpu:
            pool.run(by_processor)
        yield pool
    finally:
        pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cpu", action="store_true", help="times of the processor: for one rank")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    names = [n for n in MODELS if not options.names or n in options.names]
    found = [row for n in options.ranks for row in rows(n, names, options.cpu)]
    for row in found:
        append(options.csv, FIELDS, row)
    good = sum(AIM[0] <= r["ratio"] <= AIM[1] for r in found)
    ratios = sorted(r["ratio"] for r in found)
    print(f"{good} of {len(found)} between {AIM[0]} and {AIM[1]}; {ratios[0]} to {ratios[-1]}")


if __name__ == "__main__":
    main()

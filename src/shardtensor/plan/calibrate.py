"""Measures this CPU with so many ranks at work: rates of ops, and what Python adds to each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from ..observe.network import DGX_H100, Network
from ..ranks.testing import make_mesh
from ..ranks.workers import Pool
from ..tensor.construct import distribute_tensor
from ..train.parallelize import parallelize
from .device import Device, Rate, Rates, device_of
from .estimate import Layout, Task, estimate
from .rates import New, busy, load, measure, most, rates, steady

SHAPE = (2, 32, 16)
# seconds, on a machine that is busy
TIMEOUT = 900.0


class Layer(nn.Module):
    """Small ops, as most of a model's: what they take is what calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def chain() -> nn.Module:
    return nn.Sequential(*(Layer() for _ in range(8)))


@dataclass(frozen=True)
class Found:
    """rates: None where there is a reason not to keep them."""

    rates: Rates | None
    why: tuple[str, ...]


def calibrated(ranks: int, network: Network = DGX_H100, pool: Pool | None = None) -> Found:
    """What ops take here with so many ranks at work: of a pool, or of processes of their own.

    network: what is between them.
    """
    mine = pool or Pool(ranks)
    try:
        (classes, new, why), step = mine.run(_measured, timeout=TIMEOUT)[0]
    finally:
        if pool is None:
            mine.close()
    bare = rates(classes, ranks, new)
    return Found(replace(bare, launch=launch_of(bare, step, network)), tuple(why))


def launch_of(bare: Rates, step: float, network: Network) -> float:
    """Seconds of a kernel beyond its class's, by the step of `chain`."""
    device: Device = device_of(bare)
    found = estimate(
        Task(chain, [SHAPE], dims=(1,)), Layout(1, (1,), (bare.ranks,)), device, network
    )
    if found.refused:
        raise RuntimeError(found.refused)
    sent = found.communication if bare.ranks > 1 else 0.0
    kernels = sum(p.kernels for p in found.modules.values())
    return max(1e-6, (step - found.compute - sent) / kernels)


def _measured() -> tuple[tuple[dict[str, Rate], New, list[str]], float]:
    """On a rank of the pool: rates, why they are not to be kept, and seconds of a step."""
    torch.manual_seed(0)
    found = measure()
    n = dist.get_world_size()
    model, x = chain(), torch.randn(SHAPE)
    if n > 1:
        mesh = make_mesh((n,))
        parallelize(model, mesh)
        x = distribute_tensor(x, mesh, [Shard(1)])
    return found, step_seconds(model, x)


def step_seconds(model: nn.Module, x: Any) -> float:
    """Of a training step with AdamW, as a plan has it; the same on every rank."""
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return most([steady(step)[0]])[0]


def is_busy() -> str:
    """Why this machine is too busy to be measured; "" if it is quiet."""
    return busy(*load())

"""What a plan says of memory and messages over what a step takes, for ten models of the zoo.

    OMP_NUM_THREADS=1 python benchmarks/plan_memory.py [--ranks 2 4] [--csv FILE] [NAME ...]

Third-party models (extra `zoo`), a training step of AdamW each, rows over all ranks, in processes.
ratio: the peak of the rank that holds most, over the planned one. sent: whether what the planned
rank sends is, collective by collective and to a byte, what a rank sent. About four minutes.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measured import held_and_sent
from tables import append
from torch import nn
from torch.distributed.tensor import Shard
from zoo_models import MODELS

import shardtensor as st
from shardtensor.observe.network import DGX_H100
from shardtensor.plan.estimate import H100, Layout, Task, attention_rates, estimate
from shardtensor.ranks.testing import make_mesh
from shardtensor.ranks.workers import Pool

# inputs as large as lets activations count beside weights, of two samples: the kernel that a CPU
# takes for a 3-D convolution of one unrolls the input into memory of its own
NAMES = {
    "tv.convnext_tiny": (2, 3, 256, 256), "tv.densenet121": (2, 3, 256, 256),
    "tv.efficientnet_b0": (2, 3, 256, 256), "timm.vit_tiny_patch16_224": None,
    "timm.resnet50": (2, 3, 256, 256), "smp.Unet": None, "monai.UNETR": (2, 1, 32, 32, 32),
    "hf.Segformer": (2, 3, 256, 256), "diffusers.UNet2D": (2, 3, 64, 64),
    "neuralop.FNO2d": (2, 3, 128, 128),
}  # fmt: skip
FIELDS = ("name", "ranks", "planned", "measured", "ratio", "messages", "sent")


def made(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    build, shape, _ = MODELS[name]
    torch.manual_seed(0)
    return build().train(), NAMES[name] or shape


def measured(name: str) -> tuple[int, list[Any]]:
    """(bytes at the peak, what was sent) of this rank."""
    warnings.simplefilter("ignore")
    model, shape = made(name)
    mesh = make_mesh((dist.get_world_size(),))
    st.parallelize(model, mesh)
    x = st.distribute_tensor(torch.randn(shape), mesh, [Shard(MODELS[name][2])])
    # a part of what was global
    part = x.to_local().clone()
    x = st.ShardTensor.from_local(part, mesh, x.placements, sizes=x.spec.sizes)
    return held_and_sent(model, x, attention_rates(H100, DGX_H100, dist.get_world_size()))


def row(pool: Pool, name: str, ranks: int) -> dict[str, Any]:
    """Of a model on so many ranks."""
    _, shape = made(name)
    dim = MODELS[name][2]
    plan = estimate(Task(lambda: made(name)[0], [shape], dims=(dim,)), Layout(1, (dim,), (ranks,)))
    if plan.refused:
        raise RuntimeError(f"{name}: {plan.refused}")
    real = pool.run(measured, name, timeout=1200)
    peak = max(p for p, _ in real)
    sent = [(s.collective, s.bytes, s.messages) for s in plan.sent]
    exact = sent in [s for _, s in real]
    values = name, ranks, plan.peak, peak, round(peak / plan.peak, 3), len(sent), exact
    return dict(zip(FIELDS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = []
    for ranks in options.ranks:
        pool = Pool(ranks)
        for name in options.names or NAMES:
            found.append(row(pool, name, ranks))
            print(", ".join(f"{k} {v}" for k, v in found[-1].items()), flush=True)
        pool.close()
    for told in found:
        append(options.csv, FIELDS, told)
    near = sum(0.9 <= r["ratio"] <= 1.1 for r in found)
    print(
        f"peak within 10 %: {near} of {len(found)}; sent exactly: {sum(r['sent'] for r in found)}"
    )


if __name__ == "__main__":
    main()

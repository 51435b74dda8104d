"""docs/trace.png and the tables of docs/trace.md: python docs/drawings/step.py"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, run_workers

DOCS = Path(__file__).parent.parent
sys.path.insert(0, str(DOCS.parent / "examples"))


def step() -> None:
    """A training step of a U-Net on three uneven shards."""
    from models import UNet

    torch.manual_seed(0)
    mesh = make_mesh((3,))
    model = st.parallelize(UNet(1, 1), mesh)
    x = torch.randn(2, 1, 384, 192)
    x = st.distribute_tensor(x, mesh, [Shard(2)], sizes={2: [192, 112, 80]})
    for _ in range(2):
        model(x).square().mean().backward()
    with st.trace() as plain:
        loss = model(x).square().mean()
        loss.backward()
    waits = plain.gather()
    with st.trace(memory=True) as t:
        # the profiler does not start on all ranks at once
        dist.barrier()
        loss = model(x).square().mean()
        loss.backward()
    timeline = t.gather()
    if dist.get_rank() == 0:
        timeline.picture(DOCS / "trace.png")
        print(plain.table(), waits.table(), sep="\n\n")


if __name__ == "__main__":
    run_workers(3, step)

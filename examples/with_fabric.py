"""Lightning Fabric with samples that are sharded over ranks.

    torchrun --standalone --nproc-per-node 2 examples/with_fabric.py

Fabric has one process for each rank and would treat every rank as a replica with samples of its own
(DDP, averaged gradients). Here the ranks share each sample: Fabric runs in single-device mode in
every process, for precision, devices and backward, and `parallelize` sums the gradients.
"""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 1, 3, padding=1))


def train(fabric, model, shard, steps=5):
    """Losses of a few steps; shard gives the model its part of a sample."""
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), 1e-2))
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = shard(torch.randn(2, 1, 32, 24, generator=draw).to(fabric.device))
        loss = (model(x) - x.roll(1, 2)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main():
    torch.set_num_threads(1)
    mesh, device = st.init()
    fabric = Fabric(accelerator=device.type, devices=[device.index] if device.index else 1)
    alone = train(fabric, build(), lambda x: x)
    model = st.parallelize(build().to(device), mesh)
    sharded = train(fabric, model, lambda x: st.distribute_tensor(x, mesh, [Shard(2)]))
    if torch.distributed.get_rank() == 0:
        apart = max(abs(a - b) / a for a, b in zip(alone, sharded, strict=True))
        print(f"losses {sharded[0]:.6f} to {sharded[-1]:.6f}")
        print(f"largest relative difference from one device: {apart:.1e}")


if __name__ == "__main__":
    main()

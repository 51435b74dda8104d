"""Hugging Face Accelerate with samples that are sharded over ranks.

    torchrun --standalone --nproc-per-node 2 examples/with_accelerate.py

`accelerator.prepare(model)` would wrap the model in DDP, which averages gradients over ranks that
have samples of their own. Here the ranks share each sample and `parallelize` sums the gradients:
the model stays as it is; Accelerate has the optimizer, mixed precision, backward and logging.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 1, 3, padding=1))


def train(accelerator, model, shard, steps=5):
    """Losses of a few steps; shard gives the model its part of a sample."""
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), 1e-2))
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = shard(torch.randn(2, 1, 32, 24, generator=draw).to(accelerator.device))
        with accelerator.autocast():
            loss = (model(x) - x.roll(1, 2)).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main():
    torch.set_num_threads(1)
    mesh, device = st.init()
    accelerator = Accelerator(cpu=device.type == "cpu")
    alone = train(accelerator, build().to(device), lambda x: x)
    model = st.parallelize(build().to(device), mesh)
    sharded = train(accelerator, model, lambda x: st.distribute_tensor(x, mesh, [Shard(2)]))
    if accelerator.is_main_process:
        apart = max(abs(a - b) / a for a, b in zip(alone, sharded, strict=True))
        print(f"losses {sharded[0]:.6f} to {sharded[-1]:.6f}")
        print(f"largest relative difference from one device: {apart:.1e}")


if __name__ == "__main__":
    main()

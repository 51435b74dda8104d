"""Train a U-Net and a ViT on Navier-Stokes fields, each sample sharded along its rows.

    torchrun --nproc-per-node 2 examples/train.py --data out/navier_stokes.hdf5
    python examples/train.py --data out/navier_stokes.hdf5 --plain      # the same on one device

Nothing but the line that reads a batch differs between the two. With GPUs: one process per GPU.
"""

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import UNet, ViT
from rich.progress import Progress
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.io import WellFile, read_sharded
from shardtensor.ranks import measure

FIELD = ["vorticity"]
BATCH, RATE, SEED = 4, 1e-3, 0


def build(name, shape):
    torch.manual_seed(SEED)
    if name == "U-Net":
        return UNet(1, 1, width=24, depth=2, periodic=True)
    return ViT(shape, 8, 1, 1, width=96, depth=3, heads=4)


def batches(file, count):
    """`count` lists of (trajectory, step), the same on every rank."""
    order = torch.Generator().manual_seed(SEED)
    for _ in range(count):
        picked = torch.randint(
            0, file.n_trajectories * (file.n_steps - 1), (BATCH,), generator=order
        )
        yield [divmod(int(i), file.n_steps - 1) for i in picked]


def read(file, places, device, mesh):
    """Fields (B, 1, H, W) at some (trajectory, step); on a mesh each rank reads only its rows."""
    if mesh is not None:
        return read_sharded(file, FIELD, places, mesh, [Shard(2)])
    return torch.stack([file.read(FIELD, t, s) for t, s in places]).to(device)


def train(name, file, steps, device, mesh, tick):
    model = build(name, file.shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    losses, seconds = [], []

    def step(x, y):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    for places in batches(file, steps):
        x = read(file, places, device, mesh)
        y = read(file, [(t, s + 1) for t, s in places], device, mesh)
        begin = time.perf_counter()
        losses.append(step(x, y).item())
        seconds.append(time.perf_counter() - begin)
        tick()
    peak = measure.peak_bytes(lambda: step(x, y), device)
    saved = measure.saved_bytes(lambda: F.mse_loss(model(x), y))
    model.eval()
    with torch.no_grad():
        shown = read(file, [(0, file.n_steps // 2)], device, mesh)
        fields = [shown, model(shown)]
    fields = [f.full_tensor() if isinstance(f, st.ShardTensor) else f for f in fields]
    cuts = list(shown.spec.dims[2].sizes) if mesh is not None else [file.shape[0]]
    return {
        "losses": losses, "seconds": statistics.median(seconds[1:]), "peak": peak, "saved": saved,
        "fields": [f[0, 0].cpu() for f in fields], "cuts": cuts,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--plain", action="store_true", help="one device, no sharding")
    parser.add_argument("--out", help="where rank 0 writes the results (torch.save)")
    args = parser.parse_args()
    mesh, device = None, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not args.plain:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        # ends the ranks together, too: gloo aborts one now and then that others leave behind
        mesh, device = st.init()
    first = mesh is None or dist.get_rank() == 0
    results = {}
    with WellFile(args.data) as file, Progress(disable=not first) as bar:
        for name in ("U-Net", "ViT"):
            ranks = "one device" if mesh is None else f"{mesh.size()} ranks"
            task = bar.add_task(f"{name} on {ranks}", total=args.steps)
            results[name] = train(
                name, file, args.steps, device, mesh, lambda task=task: bar.advance(task)
            )
            results[name]["bytes_read"] = file.bytes_read
    if mesh is not None:
        every = [None] * mesh.size()
        dist.all_gather_object(every, {k: (r["peak"], r["saved"]) for k, r in results.items()})
        for name, r in results.items():
            r["peak"] = max(e[name][0] for e in every)
            r["saved"] = max(e[name][1] for e in every)
    if first:
        for name, r in results.items():
            print(f"{name}: loss {r['losses'][0]:.6f} to {r['losses'][-1]:.6f}")
        if args.out:
            torch.save(results, args.out)


if __name__ == "__main__":
    main()

"""Train, save while training goes on, die, and go on where the last checkpoint ends.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/resume.py --kill-at 7

--kill-at kills rank 1 in that step, once. torchrun starts all ranks again; they load the latest
complete checkpoint. losses.jsonl has the loss of every step: the same as without the accident.
Other numbers of ranks may go on, too: the losses are then the same but for the order of sums.
"""

import argparse
import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import checkpoint


def build():
    torch.manual_seed(0)
    first, last = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
    return nn.Sequential(first, nn.GroupNorm(4, 16), nn.GELU(), last)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("out/resume"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--kill-at", type=int, help="rank 1 is killed in this step, once")
    parser.add_argument("--double", action="store_true", help="in float64")
    args = parser.parse_args()
    dtype = torch.float64 if args.double else torch.float32
    torch.set_num_threads(1)
    mesh, device = st.init()
    rank = torch.distributed.get_rank()

    model = st.parallelize(build().to(device, dtype), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    random = checkpoint.Randomness()

    def state(step):
        weights, moments = get_state_dict(model, optimizer)
        return {
            "model": weights, "optimizer": moments, "scheduler": scheduler.state_dict(),
            "random": random, "step": step,
        }  # fmt: skip

    first = 0
    found = checkpoint.latest(args.folder)
    if found is not None:
        loaded = checkpoint.load(state(0), found)
        set_state_dict(
            model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
        )
        scheduler.load_state_dict(loaded["scheduler"])
        first = loaded["step"]
        if rank == 0:
            print(f"resumed at step {first} from {found}", flush=True)

    for step in range(first, args.steps):
        # the generators' states are in the checkpoint, too
        whole = torch.zeros(2, 1, 32, 24, device=device, dtype=dtype)
        whole = st.distribute_tensor(whole, mesh, [Shard(2)])
        # as one device draws them, so that other numbers of ranks may go on; CUDA has no such draw
        with st.random.match_single_device() if device.type == "cpu" else nullcontext():
            x = torch.randn_like(whole)
        loss = (model(x) - x.roll(1, 2)).square().mean()
        loss.backward()
        if step == args.kill_at and rank == 1 and not (args.folder / "killed").exists():
            (args.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        value = loss.item()
        if rank == 0:
            args.folder.mkdir(parents=True, exist_ok=True)
            with (args.folder / "losses.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": value}) + "\n")
        if (step + 1) % args.every == 0:
            checkpoint.save_async(state(step + 1), args.folder, f"step{step + 1}")
    checkpoint.finish()
    if rank == 0:
        print(f"step {args.steps}: loss {value:.6f}")


if __name__ == "__main__":
    main()

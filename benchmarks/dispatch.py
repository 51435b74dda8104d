"""What a call on a ShardTensor costs over the plain call, on one rank and tiny tensors.

    OMP_NUM_THREADS=1 python benchmarks/dispatch.py [--csv FILE]

Microseconds per call, the least of several repetitions, for plain tensors, ShardTensor and torch's
DTensor side by side; the last row is forward and backward of a chain of products, per product.
"""

import argparse
import csv
import platform
import timeit
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardtensor as st

CHAIN = 10


def microseconds(fn, calls=2000, repeats=7):
    fn()
    return min(timeit.repeat(fn, number=calls, repeat=repeats)) / calls * 1e6


def chain(x):
    y = x
    for _ in range(CHAIN):
        y = y * x
    return y


def cases(mesh):
    """Name -> [call on plain, on ShardTensor, on DTensor]."""
    plain, image, weight = torch.randn(4, 8), torch.randn(1, 4, 8, 8), torch.randn(8, 8)
    kernel, scale = torch.randn(4, 4, 3, 3), torch.randn(8)

    def every(x, dim):
        whole = distribute_tensor(x, mesh, [Shard(dim)])
        return [x, st.distribute_tensor(x, mesh, [Shard(dim)]), whole]

    def replicated(x):
        return [x, x, distribute_tensor(x, mesh, [Replicate()])]

    ops = {
        "x + y": lambda x, w: x + x,
        "gelu": lambda x, w: F.gelu(x),
        "linear": lambda x, w: F.linear(x, w[0]),
        "view": lambda x, w: x.view(4, 2, 4),
        "layer_norm": lambda x, w: F.layer_norm(x, (8,), w[1]),
        "sum": lambda x, w: x.sum(),
        "shape": lambda x, w: x.shape,
    }
    weights = list(zip(replicated(weight), replicated(scale), strict=True))
    found = {
        name: [lambda f=f, x=x, w=w: f(x, w) for x, w in zip(every(plain, 0), weights, strict=True)]
        for name, f in ops.items()
    }
    found["conv2d"] = [
        lambda x=x, k=k: F.conv2d(x, k, padding=1)
        for x, k in zip(every(image, 2), replicated(kernel), strict=True)
    ]
    leaves = [x.detach().requires_grad_() for x in every(plain, 0)]
    ones = every(torch.ones(4, 8), 0)
    found["products, both ways"] = [
        lambda x=x, g=g: chain(x).backward(g) for x, g in zip(leaves, ones, strict=True)
    ]
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    print(f"microseconds a call; {machine}, shardtensor {st.__version__}")
    print(
        f"{'':20} {'plain':>8} {'ShardTensor':>12} {'DTensor':>9} {'over plain':>11} {'ratio':>6}"
    )
    rows = []
    for name, calls in cases(mesh).items():
        n = 200 if "products" in name else 2000
        per = CHAIN if "products" in name else 1
        plain, ours, dtensor = (microseconds(c, n) / per for c in calls)
        over = ours - plain
        ratio = over / max(dtensor - plain, 1e-9)
        print(f"{name:20} {plain:8.2f} {ours:12.2f} {dtensor:9.2f} {over:11.2f} {ratio:6.2f}")
        rows.append([machine, st.__version__, name, plain, ours, dtensor])
    print("ratio: what is over plain, of what DTensor has over plain")
    if args.csv:
        with args.csv.open("a", newline="") as f:
            csv.writer(f).writerows(rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

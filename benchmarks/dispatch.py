"""What a call on a ShardTensor costs over the plain call, on one rank and tiny tensors.

    OMP_NUM_THREADS=1 python benchmarks/dispatch.py [--csv FILE]

Microseconds per call, the least of several repetitions, for plain tensors, ShardTensor and torch's
DTensor side by side. "products, both ways" is forward and backward of a chain of products, per
product; "MLP, both ways" that of two blocks of linear, gelu, linear. Rows that begin with "new
shape" are the median of first calls, each on a shape not seen before.
"""

import argparse
import statistics
import time
import timeit
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tables import extend, hardware
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardtensor as st

CHAIN = 10


def microseconds(fn, calls=50, repeats=400):
    """Of a call, the least of many short repetitions: other programs fall between them."""
    fn()
    return min(timeit.repeat(fn, number=calls, repeat=repeats)) / calls * 1e6


def chain(x):
    y = x
    for _ in range(CHAIN):
        y = y * x
    return y


def mlp(x, layers):
    leaves = [w.detach().requires_grad_() for layer in layers for w in layer]
    for first, second in zip(leaves[::2], leaves[1::2], strict=True):
        x = x + F.linear(F.gelu(F.linear(x, first)), second)
    x.sum().backward()


def first_calls(mesh, shapes=80):
    """Name -> median microseconds of [plain, ShardTensor, DTensor] calls on new shapes."""
    weight = torch.randn(8, 8)
    ops = {
        "x + y": lambda x, w: x + x,
        "linear": lambda x, w: F.linear(x, w),
        "view": lambda x, w: x.view(-1, 2, 4),
        "sum": lambda x, w: x.sum(0),
    }
    found = {}
    for name, fn in ops.items():
        times = [[], [], []]
        for n in range(shapes):
            x = torch.randn(100 + n, 8)
            dtensor = distribute_tensor(x, mesh, [Shard(0)])
            ours = st.distribute_tensor(x, mesh, [Shard(0)])
            replicated = distribute_tensor(weight, mesh, [Replicate()])
            for i, (y, w) in enumerate(((x, weight), (ours, weight), (dtensor, replicated))):
                begin = time.perf_counter()
                fn(y, w)
                times[i].append(1e6 * (time.perf_counter() - begin))
        found[f"new shape: {name}"] = [statistics.median(t) for t in times]
    return found


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
        "transpose": lambda x, w: x.transpose(0, 1),
        "expand": lambda x, w: x.expand(2, 4, 8),
        "chunk": lambda x, w: x.chunk(2, 1),
        "x[:, 1:3]": lambda x, w: x[:, 1:3],
        "softmax": lambda x, w: x.softmax(-1),
        "layer_norm": lambda x, w: F.layer_norm(x, (8,), w[1]),
        "sum": lambda x, w: x.sum(),
        "mean": lambda x, w: x.mean(),
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
    layers = [[replicated(torch.randn(*s)) for s in ((16, 8), (8, 16))] for _ in range(2)]
    inputs = every(plain, 0)
    found["MLP, both ways"] = [
        lambda i=i, x=x: mlp(x, [[pair[i] for pair in layer] for layer in layers])
        for i, x in enumerate(inputs)
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
    machine = hardware()
    print(f"microseconds a call; {machine}, shardtensor {st.__version__}")
    print(
        f"{'':20} {'plain':>8} {'ShardTensor':>12} {'DTensor':>9} {'over plain':>11} {'ratio':>6}"
    )
    rows = []
    found = {}
    for name, calls in cases(mesh).items():
        n = 5 if "both ways" in name else 50
        per = CHAIN if "products" in name else 1
        found[name] = [microseconds(c, n) / per for c in calls]
    for name, (plain, ours, dtensor) in (found | first_calls(mesh)).items():
        over = ours - plain
        ratio = over / max(dtensor - plain, 1e-9)
        print(f"{name:20} {plain:8.2f} {ours:12.2f} {dtensor:9.2f} {over:11.2f} {ratio:6.2f}")
        rows.append([machine, st.__version__, name, plain, ours, dtensor])
    print("ratio: what is over plain, of what DTensor has over plain")
    extend(args.csv, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

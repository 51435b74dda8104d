"""A spectral layer on a sharded grid: written as usual, and with transforms that keep few modes.

    OMP_NUM_THREADS=1 python benchmarks/fno.py [--ranks N] [--size N] [--csv FILE]

Forward and backward on N gloo processes: milliseconds of the least of several repetitions (of the
slowest rank), bytes that a rank sends, and these as a share of the whole spectrum's two all-to-alls
each way. The last row is the layer on one process.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tables import extend, hardware
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ops.spectral import truncated_irfftn, truncated_rfftn
from shardtensor.ranks.testing import make_mesh, run_workers

CHANNELS, MODES, REPEATS = 16, (12, 12), 5
PRODUCT = "bixy,ioxy->boxy"


def usual(x, weight):
    m1, m2 = MODES
    y = torch.fft.rfft2(x)
    out = torch.zeros(*x.shape[:3], x.shape[3] // 2 + 1, dtype=y.dtype)
    out[:, :, :m1, :m2] = torch.einsum(PRODUCT, y[:, :, :m1, :m2], weight[:, :, :m1])
    out[:, :, -m1:, :m2] = torch.einsum(PRODUCT, y[:, :, -m1:, :m2], weight[:, :, m1:])
    return torch.fft.irfft2(out, s=x.shape[-2:])


def truncated(x, weight):
    y = torch.einsum(PRODUCT, truncated_rfftn(x, MODES), weight)
    return truncated_irfftn(y, MODES, x.shape[-2:], like=x)


def measured(fn, size, sharded):
    """(milliseconds, bytes sent by this rank) of forward and backward."""
    torch.manual_seed(0)
    x = torch.randn(1, CHANNELS, size, size)
    m1, m2 = MODES
    weight = torch.randn(CHANNELS, CHANNELS, 2 * m1, m2, dtype=torch.cfloat, requires_grad=True)
    if sharded:
        x = st.distribute_tensor(x, make_mesh((dist.get_world_size(),)), [Shard(2)])
    x.requires_grad_()
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        with st.trace() as t, st.fallback(max_bytes=1 << 40):
            fn(x, weight).square().mean().backward()
        dist.barrier()
        times.append(1e3 * (time.perf_counter() - begin))
    return min(times), t.bytes


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    n, size = args.ranks, args.size
    machine = hardware()
    print(f"{CHANNELS} channels, {size} x {size}, {MODES} modes; {machine}, st {st.__version__}")
    print(f"{'':12} {'ranks':>5} {'ms':>8} {'bytes':>12} {'of spectrum':>12}")
    swap = CHANNELS * (size // n) * (size // 2 + 1) * 8 * (n - 1) // n
    cases = [("usual", usual, n), ("truncated", truncated, n), ("one process", usual, 1)]
    for name, fn, ranks in cases:
        found = run_workers(ranks, measured, fn, size, ranks > 1)
        ms, sent = max(f[0] for f in found), max(f[1] for f in found)
        print(f"{name:12} {ranks:5} {ms:8.1f} {sent:12} {sent / (4 * swap):12.3f}")
        extend(args.csv, [[name, ranks, size, f"{ms:.1f}", sent, machine]])


if __name__ == "__main__":
    main()

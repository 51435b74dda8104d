"""Causal attention by ring, zigzag and all-to-all: time and bytes over the tokens of a rank.

    OMP_NUM_THREADS=1 python benchmarks/attention.py [--ranks N] [--heads N] [--csv FILE]

Forward and backward on N gloo processes, taken in turns; the median of the slowest rank's times,
and each over the plain ring's. The last column is the strategy that "auto" takes.
"""

import argparse
import csv
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.attention import strategy
from shardtensor.ranks.testing import make_mesh, run_workers

KINDS = ("ring", "zigzag", "all_to_all", "auto")
WIDTH, REPEATS = 64, 9


def measured(heads, tokens):
    """{kind: (milliseconds, bytes sent by this rank, collectives)}."""
    n = dist.get_world_size()
    mesh = make_mesh((n,))
    torch.manual_seed(0)
    qkv = [
        st.distribute_tensor(torch.randn(1, heads, n * tokens, WIDTH), mesh, [Shard(2)])
        for _ in range(3)
    ]
    for x in qkv:
        x.requires_grad_()
    kinds = [k for k in KINDS if k != "all_to_all" or heads >= n]
    times, sent = {k: [] for k in kinds}, {}
    for _ in range(REPEATS):
        for kind in kinds:
            dist.barrier()
            begin = time.perf_counter()
            with strategy(kind), st.trace() as t:
                out = F.scaled_dot_product_attention(*qkv, is_causal=True)
            out.square().mean().backward()
            dist.barrier()
            times[kind].append(1e3 * (time.perf_counter() - begin))
            sent[kind] = t.bytes, {s.collective for s in t.sent}
    return {k: (statistics.median(times[k]), *sent[k]) for k in kinds}


def name(collectives):
    if "ring" not in collectives:
        return "all_to_all"
    return "zigzag" if "window" in collectives else "ring"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    print(f"{args.ranks} ranks, {args.heads} heads of {WIDTH}, causal; {machine}")
    print(f"{'tokens':>7} {'kind':>11} {'ms':>8} {'of ring':>8} {'MB fwd':>8}   auto")
    rows = []
    for tokens in args.tokens:
        found = run_workers(args.ranks, measured, args.heads, tokens)
        slow = {k: max(f[k][0] for f in found) for k in found[0]}
        for kind in found[0]:
            sent = max(f[kind][1] for f in found) / 1e6
            auto = name(found[0][kind][2]) if kind == "auto" else ""
            over = slow[kind] / slow["ring"]
            print(f"{tokens:7} {kind:>11} {slow[kind]:8.1f} {over:8.2f} {sent:8.2f}   {auto}")
            rows.append([machine, args.ranks, args.heads, tokens, kind, slow[kind], over, sent])
    if args.csv:
        with args.csv.open("a", newline="") as f:
            csv.writer(f).writerows(rows)


if __name__ == "__main__":
    main()

"""Attention by every strategy: time and bytes over the tokens of a rank, and what "auto" takes.

    OMP_NUM_THREADS=1 python benchmarks/attention.py [--ranks N] [--heads N] [--full] [--csv FILE]
    OMP_NUM_THREADS=1 python benchmarks/attention.py --rates [--ranks N]
    OMP_NUM_THREADS=1 python benchmarks/attention.py --table    (that of docs/attention.md)
    python benchmarks/attention.py --choice

Forward and backward on N gloo processes, taken in turns: the median of the slowest rank's times,
each over the plain ring's; the least CPU time of the busiest rank, which other load on the machine
does not change as much; the time of the busiest rank's forward by `attention.cost`. --rates
measures what that model needs (`attention.strategy.RATES`), each by the least time of many.
--choice prints what "auto" takes by the model, on GPUs and on CPUs: nothing is timed.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tables import extend, hardware
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.attention import cheapest, rates, strategy
from shardtensor.attention.blocks import Rule, forward
from shardtensor.attention.cost import Rates, Way, Work, cost
from shardtensor.attention.merge import Merge
from shardtensor.attention.usp import fits
from shardtensor.comm import groups, wire
from shardtensor.ranks.testing import make_mesh, run_workers

KINDS = ("ring", "zigzag", "gather", "usp", "all_to_all", "auto")
# ranks, heads, tokens of a rank
TABLE = [(2, 4, (64, 256, 1024, 2048)), (4, 6, (64, 256, 1024))]
WIDTH, REPEATS = 64, 9
CHOICES = [(2, 12), (4, 12), (8, 12), (16, 24), (64, 12), (512, 12)]
TOKENS = [64, 256, 1024, 4096, 16384]


def measured(heads, tokens, causal):
    """{kind: (ms, CPU ms, bytes sent forward by this rank, its collectives)}."""
    n = dist.get_world_size()
    mesh = make_mesh((n,))
    torch.manual_seed(0)
    qkv = [
        st.distribute_tensor(torch.randn(1, heads, n * tokens, WIDTH), mesh, [Shard(2)])
        for _ in range(3)
    ]
    for x in qkv:
        x.requires_grad_()
    ways = {"gather", "auto", *(w.kind for w in ways_of(n, heads, causal))}
    kinds = [k for k in KINDS if k in ways]
    times, busy, sent = {k: [] for k in kinds}, {k: [] for k in kinds}, {}
    for _ in range(REPEATS):
        for kind in kinds:
            dist.barrier()
            begin, worked = time.perf_counter(), time.process_time()
            with strategy(kind), st.trace() as t:
                out = F.scaled_dot_product_attention(*qkv, is_causal=causal)
            out.square().mean().backward()
            busy[kind].append(1e3 * (time.process_time() - worked))
            dist.barrier()
            times[kind].append(1e3 * (time.perf_counter() - begin))
            sent[kind] = t.bytes, tuple(s.collective for s in t.sent)
    return {k: (statistics.median(times[k]), min(busy[k]), *sent[k]) for k in kinds}


def ways_of(ranks, heads, causal):
    """What "auto" chooses among."""
    ways = [Way("ring"), *[Way("zigzag")] * causal]
    ways += [Way("usp", u) for u in range(2, ranks) if ranks % u == 0 and fits(heads, heads, u)]
    return ways + [Way("all_to_all", ranks)] * (heads >= ranks)


def modelled(heads, tokens, ranks, causal):
    """{kind: milliseconds of the busiest rank, forward}."""
    even = (tokens,) * ranks
    work = Work(even, even, 1, heads, heads, WIDTH, WIDTH, 4, causal)
    found = {}
    for way in [*ways_of(ranks, heads, causal), Way("gather", ranks)]:
        ms = 1e3 * cost(work, way).seconds(rates("cpu", 4, ranks))
        found[way.kind] = min(ms, found.get(way.kind, ms))
    return found


def taken(found):
    """What "auto" took: the strategy that called the same collectives, on the first rank."""
    by = {found[0][k][3]: k for k in found[0] if k != "auto"}
    return by.get(found[0]["auto"][3], "?")


def table():
    """CPU ms of the busiest rank under a causal mask, in bold what "auto" takes."""
    kinds = [k for k in KINDS if k != "auto"]
    print(f"| ranks, heads, tokens of a rank | {' | '.join(kinds)} |")
    print("|---" * (len(kinds) + 1) + "|")
    for ranks, heads, sizes in TABLE:
        for tokens in sizes:
            found = run_workers(ranks, measured, heads, tokens, True)
            busy = {k: f"{max(f[k][1] for f in found):.3g}" for k in found[0]}
            if (best := taken(found)) in busy:
                busy[best] = f"**{busy[best]}**"
            row = " | ".join(busy.get(k, "") for k in kinds)
            print(f"| {ranks}, {heads}, {tokens} | {row} |", flush=True)


def choices():
    """What "auto" takes by the tokens of a rank: a line for each number of ranks and heads."""
    print(
        f"| ranks, heads | mask | GPUs, bf16: {TOKENS} | CPUs, fp32: {TOKENS} |\n|---|---|---|---|"
    )
    for ranks, heads in CHOICES:
        for causal in (False, True):
            told = []
            for device, item in (("cuda", 2), ("cpu", 4)):
                found = []
                for tokens in TOKENS:
                    even = (tokens,) * ranks
                    work = Work(even, even, 1, heads, heads, WIDTH, WIDTH, item, causal)
                    ways = ways_of(ranks, heads, causal)
                    way = cheapest(work, ways, rates(device, item, ranks), gathers=True)
                    several = way.kind in ("usp", "gather") and 1 < way.team < ranks
                    found.append(f"{way.kind} {way.team}" if several else way.kind)
                told.append(", ".join(found))
            print(f"| {ranks}, {heads} | {'causal' if causal else ''} | {' | '.join(told)} |")


def least(fn, repeats=30):
    """The least time of a call, in seconds."""
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        fn()
        found.append(time.perf_counter() - begin)
    return min(found)


def links():
    """(latency, bandwidth) of what every rank gives the next one."""
    n, group = dist.get_world_size(), groups.world()
    me, found = dist.get_rank(), []
    for numbers in (16, 1 << 20):
        x = torch.randn(numbers)
        to, of = {(me + 1) % n: [x]}, {(me - 1) % n: [x.shape]}
        found.append(least(lambda: wire.exchange(to, of, x, group, "ring")))  # noqa: B023
    return found[0], 4 * (1 << 20) / (found[1] - found[0])


def measured_rates(ranks):
    """The rates of this machine, fp32."""
    q = torch.randn(1, 8, 1024, WIDTH)
    rule = Rule(WIDTH**-0.5)
    multiplied = 8 * 1024 * 1024 * 2 * WIDTH
    multiply = multiplied / least(lambda: forward(q, q, q, None, rule))
    part, merge = forward(q, q, q, None, rule), Merge(q, q)
    merge.add((0, 1024), *part)
    merging = q.numel() / least(lambda: merge.add((0, 1024), *part))
    found = run_workers(ranks, links)
    return Rates(multiply, merging, max(f[0] for f in found), min(f[1] for f in found))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--full", action="store_true", help="without a causal mask")
    parser.add_argument("--rates", action="store_true", help="measure the model's rates instead")
    parser.add_argument("--table", action="store_true", help="print that of docs/attention.md")
    parser.add_argument("--choice", action="store_true", help="what the model chooses instead")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    if args.choice:
        choices()
        return
    machine = hardware()
    if args.rates:
        print(f"{args.ranks} ranks; {machine}")
        print("Rates(" + ", ".join(f"{x:.1e}" for x in measured_rates(args.ranks)) + ")")
        return
    if args.table:
        table()
        return
    causal = not args.full
    print(f"{args.ranks} ranks, {args.heads} heads of {WIDTH}, causal {causal}; {machine}")
    names = ("ms", "of ring", "CPU ms", "model", "MB fwd")
    print(f"{'tokens':>7} {'kind':>11} " + " ".join(f"{x:>8}" for x in names) + "   auto")
    rows = []
    for tokens in args.tokens:
        found = run_workers(args.ranks, measured, args.heads, tokens, causal)
        model = modelled(args.heads, tokens, args.ranks, causal)
        slow = {k: max(f[k][0] for f in found) for k in found[0]}
        for kind in found[0]:
            sent, cpu = max(f[kind][2] for f in found) / 1e6, max(f[kind][1] for f in found)
            auto = taken(found) if kind == "auto" else ""
            over, by_model = slow[kind] / slow["ring"], model.get(kind, min(model.values()))
            figures = f"{slow[kind]:8.1f} {over:8.2f} {cpu:8.1f} {by_model:8.1f} {sent:8.2f}"
            print(f"{tokens:7} {kind:>11} {figures}   {auto}", flush=True)
            rows.append(
                [machine, args.ranks, args.heads, tokens, kind, slow[kind], over, cpu, sent]
            )
    extend(args.csv, rows)


if __name__ == "__main__":
    main()

"""How much of a slow link's time is hidden behind computation.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py [--csv FILE]

Two gloo processes; every exchange arrives a given delay after it was sent, while both compute on.
alone: the op's time without a delay, the computation and gloo's own work. Efficiency: (alone +
delays - together) / min(alone, delays), 1 where everything is hidden, 0 where nothing is. Forward
and backward, median over repetitions of the slower process; delays are chosen so that those of one
call sum to half of, and as much as, the time alone.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py --crossover

From which size of a shard on it pays without any delay: the time with the halo in flight over that
of one haloed copy, forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py --strips

What convolutions gain from an exchange of their own (`rules/conv/halo.py`): their time over that by
the exchange that serves every stencil.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tables import extend
from torch import Tensor
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.attention import strategy
from shardtensor.comm import wire
from shardtensor.ranks.testing import make_mesh
from shardtensor.ranks.workers import Pool
from shardtensor.rules import overlap
from shardtensor.rules.conv import conv as conv_rule

REPEATS = 9
stock, forward = wire.start_parcels, conv_rule._forward
delay, exchanges = 0.0, 0


def slow(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    """`wire.start_parcels` over a link with a delay."""
    global exchanges
    exchanges += 1
    due = time.perf_counter() + delay
    arrived = stock(*args, **kwargs)

    def late() -> Any:
        found = arrived()
        time.sleep(max(0.0, due - time.perf_counter()))
        return found

    return late


def conv(kernel: int, stride: int = 1) -> Callable[[Tensor], Tensor]:
    weight = torch.randn(32, 32, kernel, kernel, requires_grad=True)
    return lambda x: F.conv2d(x, weight, None, stride, kernel // 2)


def attention(x: Tensor) -> Tensor:
    with strategy("ring"):
        return F.scaled_dot_product_attention(x, x, x)


CASES: dict[str, tuple[Callable[[], Any], Callable[[int], list[int]], tuple[int, ...], int]] = {
    "conv 3x3": (lambda: conv(3), lambda n: [1, 32, n, n], (128, 256, 512), 2),
    "conv 7x7": (lambda: conv(7), lambda n: [1, 32, n, n], (128, 256, 512), 2),
    "conv 3x3 by 2": (lambda: conv(3, 2), lambda n: [1, 32, n, n], (256, 512), 2),
    "max_pool 3x3": (
        lambda: lambda x: F.max_pool2d(x, 3, 2, 1), lambda n: [1, 32, n, n], (256, 512), 2,
    ),
    "ring attention": (lambda: attention, lambda n: [1, 2, n, 64], (512, 1024, 2048), 2),
}  # fmt: skip


def made(name: str, size: int) -> tuple[Any, Tensor, Tensor]:
    """The case's function, its input of two shards and a cotangent, after a first call."""
    build, shape, _, dim = CASES[name]
    torch.manual_seed(0)
    fn = build()
    x = st.distribute_tensor(torch.randn(shape(size)), make_mesh((2,)), [Shard(dim)])
    x.requires_grad_()
    return fn, x, torch.ones_like(fn(x).detach())


def run(name: str, size: int) -> list[tuple[float, float, float]]:
    """(seconds alone, of delays, together) for each of two delays."""
    global delay, exchanges
    wire.start_parcels = slow
    fn, x, g = made(name, size)

    def once() -> float:
        dist.barrier()
        begin = time.perf_counter()
        fn(x).backward(g)
        dist.barrier()
        return time.perf_counter() - begin

    def median() -> float:
        found = torch.tensor(statistics.median(once() for _ in range(REPEATS)))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    delay = 0.0
    once()
    exchanges = 0
    once()
    count, rows = max(1, exchanges), []
    for share in (0.5, 1.0):
        delay = 0.0
        alone = median()
        delay = share * alone / count
        rows.append((alone, count * delay, median()))
    wire.start_parcels = stock
    return rows


def flight(on: bool) -> None:
    """Halos in flight or one haloed copy, whatever the shards."""
    overlap.WORTH = 0 if on else 2**40


def strips(on: bool) -> None:
    """Convolutions by strips, or as every stencil."""
    overlap.WORTH = 0
    conv_rule._forward = forward if on else lambda *args: forward(*args)._replace(halo=None)


def ratio(name: str, size: int, switch: Callable[[bool], None]) -> float:
    """Time with a switch on over that with it off: both in turn, the median of the ratios."""
    fn, x, g = made(name, size)
    worth, ratios = overlap.WORTH, []
    for _ in range(4 * REPEATS):
        times = []
        for on in (True, False):
            switch(on)
            dist.barrier()
            begin = time.perf_counter()
            fn(x).backward(g)
            took = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            times.append(float(took))
        ratios.append(times[0] / times[1])
    strips(True)
    overlap.WORTH = worth
    return statistics.median(ratios[2:])


def ratios(pool: Pool, names: list[str], switch: Callable[[bool], None]) -> None:
    print(f"{'':15} " + " ".join(f"{32 << i:>7}" for i in range(5)))
    for name in names:
        found = [pool.run(ratio, name, 32 << i, switch)[0] for i in range(5)]
        print(f"{name:15} " + " ".join(f"{r:7.2f}" for r in found), flush=True)
    elements = " ".join(f"{32 * (32 << i) ** 2 // 2:7}" for i in range(5))
    print(f"{'elements':15} {elements}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--strips", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    pool = Pool(2)
    if options.crossover or options.strips:
        if options.crossover:
            print(f"in flight / copied; taken from {overlap.WORTH} elements a shard on")
            ratios(pool, list(CASES)[:-1], flight)
        else:
            print("by strips / as every stencil")
            ratios(pool, ["conv 3x3", "conv 7x7"], strips)
        pool.close()
        return
    print(f"{'':15} {'size':>5} {'alone ms':>9} {'delays':>8} {'together':>9} {'efficiency':>11}")
    lines = []
    for name, (_, _, sizes, _) in CASES.items():
        for size in sizes:
            for alone, wait, both in pool.run(run, name, size)[0]:
                hidden = (alone + wait - both) / min(alone, wait)
                print(
                    f"{name:15} {size:5} {1e3 * alone:9.2f} {1e3 * wait:8.2f} {1e3 * both:9.2f} "
                    f"{hidden:11.2f}"
                )
                lines.append([name, size, alone, wait, both, hidden])
    pool.close()
    extend(options.csv, lines)


if __name__ == "__main__":
    main()

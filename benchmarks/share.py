"""CPU time of one rank's step over its share: the plain model on an input of the shard's size.

    OMP_NUM_THREADS=1 python benchmarks/share.py [--models U-Net ...] [--ranks 2] [--repeats 9]
        [--ops] [--kernels]

One rank, alone (`shardtensor.rehearse`'s silent world), so nothing waits and the wire costs
nothing: what is left over one is what sharding computes, copies and calls beside the model. Both
run in turns in one process, and the least CPU time of each counts, which other programs on the
machine hardly touch. kernels: ops of torch that work on memory in a step; calls: of Python.
Attention's share is its own queries to all keys.
--ops: what each op adds, and each kind of them, by the profiler, whose time goes on while others
run. --kernels: no models, but what oneDNN's kernels of a resnet18's convolutions take of the rows
of a shard with their neighbours', over what they take of the shard: the floor for these shapes.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_models import MODELS
from growth import kernels, python_calls
from ideal import ViT, convnet, ideal_attention
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.profiler import ProfilerActivity, profile
from zoo_models import torchvision

import shardtensor as st
from shardtensor import cache
from shardtensor._torch.world import silent_world
from shardtensor.comm import groups, together

ROWS = 256
# name -> (model, shape of its input), by the rows of the whole
CASES: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], tuple[int, ...]]]] = {
    "ConvNet": (lambda rows: convnet(), lambda rows: (1, 3, rows, 256)),
    "ViT": (lambda rows: ViT(), lambda rows: (1, 3, rows, 256)),
    "DiT": MODELS["DiT"],
    "U-Net": MODELS["U-Net"],
    "FNO": MODELS["FNO"],
    "resnet18": (
        lambda rows: torchvision("resnet18", num_classes=10),
        lambda rows: (2, 3, rows, 256),
    ),
}


class Pair:
    """The steps of one case on a rank of n: its ideal and the sharded one."""

    def __init__(self, name: str, n: int, rows: int) -> None:
        build, shape = CASES[name]
        mesh = init_device_mesh("cpu", (n,))
        torch.manual_seed(0)
        part = rows // n
        self.n = n
        self.twin, self.model = build(part), st.parallelize(build(rows), mesh)
        self.local = torch.randn(shape(part))
        self.x = st.ShardTensor.from_local(
            self.local.clone(), mesh, [Shard(2)], sizes={2: [part] * n}
        )

    def step(self, sharded: bool, backward: bool = True) -> float:
        """CPU seconds of a step."""
        model, x = (self.model, self.x) if sharded else (self.twin, self.local)
        for p in model.parameters():
            p.grad = None
        plain = F.scaled_dot_product_attention
        if not sharded:
            F.scaled_dot_product_attention = ideal_attention(self.n)
        try:
            begin = time.thread_time()
            with torch.set_grad_enabled(backward):
                y = model(x)
                if backward:
                    y.square().mean().backward()
            return time.thread_time() - begin
        finally:
            F.scaled_dot_product_attention = plain

    def ops(self, sharded: bool, repeats: int) -> dict[str, tuple[float, int]]:
        """For each op the CPU milliseconds and calls of a step, those of ops it calls left out.

        Of each call the least of the repeats counts.
        """
        least: list[tuple[str, float]] = []
        for _ in range(repeats):
            with profile(activities=[ProfilerActivity.CPU]) as prof:
                self.step(sharded)
            events = sorted(prof.events(), key=lambda e: e.time_range.start)
            now = [(e.name, e.self_cpu_time_total / 1e3) for e in events]
            if [n for n, _ in now] == [n for n, _ in least]:
                least = [(n, min(a, b)) for (n, a), (_, b) in zip(now, least, strict=True)]
            else:
                least = now
        found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        for name, ms in least:
            found[name] = found[name][0] + ms, found[name][1] + 1
        return found


def measured(name: str, n: int, rows: int, repeats: int, ops: bool) -> None:
    """Print one row."""
    cache.clear()
    together.forget()
    with silent_world(n // 2, n):
        try:
            pair = Pair(name, n, rows)
            found: dict[tuple[bool, bool], float] = {}
            for backward in (False, True):
                for i in range(repeats + 1):
                    for sharded in (False, True):
                        t = pair.step(sharded, backward)
                        least = found.get((backward, sharded), t) if i > 1 else t
                        found[backward, sharded] = min(t, least)
            steps = [partial(pair.step, s) for s in (False, True)]
            counts = [*map(kernels, steps), *(python_calls(s, ("call",)) for s in steps)]
            ideal = [1e3 * found[b, False] for b in (False, True)]
            over = [found[b, True] / found[b, False] for b in (False, True)]
            print(
                f"{name:10} {ideal[0]:9.1f} {ideal[1]:8.1f} {over[0]:9.2f} {over[1]:8.2f} "
                f"{counts[0]:9} {counts[1]:8} {counts[2]:8} {counts[3]:8}",
                flush=True,
            )
            if ops:
                beside(pair, repeats)
        finally:
            cache.clear()
            groups.forget()
            together.forget()


def beside(pair: Pair, repeats: int) -> None:
    """Print what kinds of ops add to a step, and those whose time or calls differ, in order."""
    mine, ideal = pair.ops(True, repeats), pair.ops(False, repeats)
    none = (0.0, 0)
    rows: list[tuple[Any, ...]] = []
    for key in {*mine, *ideal}:
        (a, n), (b, m) = mine.get(key, none), ideal.get(key, none)
        rows.append((a - b, key, b, m, a, n))
    rows.sort(reverse=True)
    whole = sum(ms for ms, _ in ideal.values())
    kinds: dict[str, float] = defaultdict(float)
    for more, key, *_ in rows:
        kind = "convolutions" if "convolution" in key else "other kernels"
        # rules, Functions and what is sent have names of their own
        kinds[kind if key.startswith("aten::") else "Python"] += more / whole
    print("    " + ", ".join(f"{kind} {share:+.3f}" for kind, share in sorted(kinds.items())))
    for more, key, b, m, a, n in [*rows[:18], *rows[-4:]]:
        print(f"    {key[:44]:44} {b:8.2f} ms {m:4} {a:8.2f} ms {n:4} {more:+8.2f}")


def floors(n: int, repeats: int) -> None:
    """Print a row for each convolution 3 x 3 of a resnet18, of the first of n ranks."""
    # pages of memory that is given back and comes anew would count now and then
    ctypes.CDLL(None).mallopt(-1, 2**30)
    ctypes.CDLL(None).mallopt(-3, 2**30)
    print("{:>12} {:>9} {:>8} {:>8}".format("convolution", "shard ms", "window", "strip"))
    for i, channels in enumerate((64, 128, 256, 512)):
        rows, columns = ROWS // 4 // 2**i // n, ROWS // 4 // 2**i
        w = torch.randn(channels, channels, 3, 3)
        g, x, window = (torch.randn(2, channels, rows + k, columns) for k in (0, 0, 2))
        ways: list[list[tuple[Tensor, ...]]] = [
            [(g, x, w)], [(g, window, w)],
            [(g, x, w), (g.narrow(2, 0, 1), x.narrow(2, 0, 1).clone(), w.narrow(2, 0, 1))],
        ]  # fmt: skip
        pads = [[1], [0], [1, 0]]
        least = [1e9] * 3
        for _ in range(3 * repeats):
            for k, way in enumerate(ways):
                begin = time.thread_time()
                for (dy, rows_in, kernel), pad in zip(way, pads[k], strict=True):
                    F.conv2d(rows_in, kernel, None, 1, (pad, 1))
                    torch.ops.aten.convolution_backward(
                        dy, rows_in, kernel, None, (1, 1), (pad, 1), (1, 1), False, (0, 0), 1,
                        (True, True, False),
                    )  # fmt: skip
                least[k] = min(least[k], time.thread_time() - begin)
        name = f"{channels}: {rows}x{columns}"
        over = [f"{t / least[0]:8.2f}" for t in least[1:]]
        print(f"{name:>12} {1e3 * least[0]:9.2f}", *over, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CASES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--ops", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args()
    # what arrives is made up: of numbers next to zero, which are slow, there are none in a run
    torch.set_flush_denormal(True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, one of {options.ranks}")
    if options.kernels:
        floors(options.ranks, options.repeats)
        return
    heads = "ideal ms", "step", "over it", "step", "kernels", "sharded", "calls", "sharded"
    print("{:10} {:>9} {:>8} {:>9} {:>8} {:>9} {:>8} {:>8} {:>8}".format("", *heads))
    for name in options.models:
        try:
            measured(name, options.ranks, options.rows, options.repeats, options.ops)
        except ModuleNotFoundError as e:
            print(f"{name:10} not measured: {e}")


if __name__ == "__main__":
    main()

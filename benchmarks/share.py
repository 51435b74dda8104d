"""CPU time of one rank's step over its share: the plain model on an input of the shard's size.

    OMP_NUM_THREADS=1 python benchmarks/share.py [--models U-Net ...] [--ranks 2] [--repeats 9]
        [--ops] [--kernels]

Prints the table of docs/performance.md. One rank, alone (`shardtensor.rehearse`'s silent world), so
nothing waits and the wire costs nothing: what is left over one is what sharding computes, copies
and calls beside the model. Both run in turns in one process, and the least CPU time of each counts,
which other programs on the machine hardly touch. Floor: of a step whose convolutions, by torch's
kernels alone, read the rows of their neighbours too, in one window. Kernels: ops of torch that work
on memory. Attention's share is its own queries to all keys.
--ops: what each op adds, and each kind of them, by the profiler, whose time goes on while others
run. --kernels: what a window takes over the shard, of each convolution.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, cast

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
# of a step; what is above is printed once more, with its floor
AIM = dict.fromkeys(("ConvNet", "ViT", "DiT"), 1.05) | dict.fromkeys(
    ("U-Net", "FNO", "resnet18"), 1.10
)
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


def keep_memory() -> None:
    """From now on glibc keeps the memory that this process lets go of, which makes steps alike.

    It would give large buffers back, and take them again at the next step or not, as it happens to
    come out: then thousands of page faults are part of one step and not of the other.
    """
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    if not all(libc.mallopt(of, 2**30) for of in (trim_threshold, mmap_threshold)):
        raise OSError("glibc refuses: page faults would be measured")


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


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


def measured(name: str, options: argparse.Namespace) -> tuple[str, list[float]]:
    """A row of the table, and of it forward, step and floor."""
    n, repeats = options.ranks, options.repeats
    cache.clear()
    together.forget()
    with silent_world(n // 2, n):
        try:
            pair = Pair(name, n, options.rows)
            # seconds, and page faults meanwhile
            found: dict[tuple[bool, bool], tuple[float, int]] = {}
            for backward in (False, True):
                for i in range(repeats + 1):
                    for sharded in (False, True):
                        begin = faults()
                        t = pair.step(sharded, backward), faults() - begin
                        least = found.get((backward, sharded), t) if i > 1 else t
                        found[backward, sharded] = min(t, least)
            steps = [partial(pair.step, s) for s in (False, True)]
            counts = [*map(kernels, steps), *(python_calls(s, ("call",)) for s in steps)]
            ideal = found[True, False][0]
            over = [found[b, True][0] / found[b, False][0] for b in (False, True)]
            over += [1 + windows(pair, repeats, options.kernels) / ideal]
            if most := max(n for _, n in found.values()) // 100 * 100:
                print(f"    {name}: over {most} page faults in a step that counts")
            if options.ops:
                beside(pair, repeats)
        finally:
            cache.clear()
            groups.forget()
            together.forget()
    cells = [f"{1e3 * ideal:.0f}", *(f"{x:.2f}" for x in over), *map(str, counts)]
    return f"| {name} | {' | '.join(cells)} |", over


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


def convolutions(pair: Pair) -> list[tuple[nn.Conv2d, tuple[int, ...], bool]]:
    """Those of the ideal's step: module, shape of its input, whether that has a gradient."""
    found: list[tuple[nn.Conv2d, tuple[int, ...], bool]] = []

    def note(module: nn.Conv2d, args: tuple[Tensor]) -> None:
        found.append((module, tuple(args[0].shape), args[0].requires_grad))

    hooks = [
        m.register_forward_pre_hook(note) for m in pair.twin.modules() if isinstance(m, nn.Conv2d)
    ]
    pair.step(False)
    for hook in hooks:
        hook.remove()
    return found


class Convolution:
    """Both ways of one, of torch's kernels alone, on random numbers."""

    def __init__(self, module: nn.Conv2d, shape: tuple[int, ...], into: bool) -> None:
        self.module, self.into = module, into
        (dilation, _), (stride, _), (pad, along) = (
            module.dilation, module.stride, cast("tuple[int, int]", module.padding)
        )  # fmt: skip
        reach = dilation * (module.kernel_size[0] - 1) + 1
        rows = (shape[2] + 2 * pad - reach) // stride + 1
        # rows of the shard, and all rows that those of its result read
        self.ways = [
            (torch.randn(*shape[:2], rows_in, shape[3]), (above, along))
            for rows_in, above in ((shape[2], pad), ((rows - 1) * stride + reach, 0))
        ]
        self.g = torch.randn_like(self.run(*self.ways[0]))
        self.least = [1e9] * len(self.ways)

    def run(self, x: Tensor, pad: tuple[int, int]) -> Tensor:
        m = self.module
        return F.conv2d(x, m.weight.detach(), None, m.stride, pad, m.dilation, m.groups)

    def measure(self) -> None:
        """Run each way once; the least CPU time of each is kept."""
        m = self.module
        for i, (x, pad) in enumerate(self.ways):
            begin = time.thread_time()
            self.run(x, pad)
            torch.ops.aten.convolution_backward(
                self.g, x, m.weight.detach(), None, m.stride, pad, m.dilation, False, (0, 0),
                m.groups, (self.into, True, False),
            )  # fmt: skip
            self.least[i] = min(self.least[i], time.thread_time() - begin)


def windows(pair: Pair, repeats: int, told: bool) -> float:
    """Seconds that a step's convolutions take more of a shard's rows with their neighbours'.

    told: print each, too.
    """
    found: dict[str, list[float]] = {}
    more = 0.0
    for module, shape, into in convolutions(pair):
        # 1 x 1 and patches have no neighbours
        if not int(module.padding[0]):
            continue
        name = f"{tuple(module.weight.shape)} by {module.stride[0]} on {shape}"
        if name not in found:
            kernel = Convolution(module, shape, into)
            for _ in range(2 * repeats):
                kernel.measure()
            found[name] = kernel.least
        more += found[name][1] - found[name][0]
    for name, (shard, window) in found.items() if told else ():
        print(f"    {name}: {1e3 * shard:.2f} ms, a window {window / shard:.2f} of it")
    return more


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
    keep_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, one of {options.ranks}")
    heads = "ideal ms, step", "forward", "step", "floor of a step", *(
        f"{what}, {of}"
        for what in ("kernels of a step", "calls of Python")
        for of in ("ideal", "sharded")
    )  # fmt: skip
    rows = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    above = ["| a step of | aim | now | floor |", "|---|---|---|---|"]
    for name in options.models:
        try:
            row, (_, step, least) = measured(name, options)
            rows.append(row)
            if step >= AIM[name] + 0.005:
                above.append(f"| {name} | {AIM[name]:.2f} | {step:.2f} | {least:.2f} |")
        except ModuleNotFoundError as e:
            print(f"    {name} is not measured: {e}")
    print("\n".join([*rows, "", *above]))


if __name__ == "__main__":
    main()

"""Strong and weak scaling of a training step: measured on this machine, rehearsed for more ranks.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--models U-Net ...] [--rows 128]
        [--csv FILE] [--picture FILE]

Measured: the median step of the slowest of 1, 2 and 4 gloo processes; more processes than cores
(marked *) share them. Rehearsed: one rank alone (`shardtensor.rehearse`): its compute time, peak
memory and messages. Predicted: all ranks rehearsed at once, each in a process that hears nothing of
the others, so that they share cores and memory as in the measured run, and their messages over a
link with the latency and bandwidth that gloo shows between as many processes; over measured it
tells how far a projection can be trusted. Projected: one rank alone on an assumed network,
`rehearse.DGX_H100`, at this CPU's compute speed, with communication hidden and not hidden.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_models import MODELS, step
from tables import extend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.measure import peak_bytes
from shardtensor.ranks.rehearse import DGX_H100, Link, Network, Rehearsal, rehearse
from shardtensor.ranks.workers import Pool

ROWS, REPEATS, ROUNDS = 128, 7, 10
CORES = len(os.sched_getaffinity(0))


def prepare(name: str, rows: int) -> Callable[[], Callable[[], Any]]:
    """What makes the step of one model on all ranks of the world."""

    def made() -> Callable[[], Any]:
        n = dist.get_world_size()
        mesh = init_device_mesh("cpu", (n,))
        torch.manual_seed(0)
        build, shape = MODELS[name]
        model = build(rows)
        # of no size, until each rank draws its shard
        like = torch.zeros(1).expand(shape(rows))
        x = torch.randn_like(st.distribute_tensor(like, mesh, [Shard(2)], src_data_rank=None))
        if n > 1:
            st.parallelize(model, mesh)
        return lambda: step(model, x)

    return made


def measured(name: str, rows: int) -> tuple[float, int]:
    """(median seconds, peak bytes) of this rank's step."""
    run = prepare(name, rows)()
    run()
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        run()
        dist.barrier()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), peak_bytes(run)


def link() -> tuple[float, float]:
    """(latency, seconds per byte) of a message from each process to the next, between work.

    Ranks that have just computed wait for the slowest of them and for a sleeping core to wake,
    which ranks that do nothing else do not: seven times the latency on two virtual cores.
    """
    a = torch.randn(300, 300)
    n, me = dist.get_world_size(), dist.get_rank()
    times = {}
    for nbytes in (0, 8, 1 << 22):
        # to the next rank, as halos and blocks of keys travel
        to, of = [0] * n, [0] * n
        to[(me + 1) % n] = of[(me - 1) % n] = nbytes
        x, y = torch.zeros(2, nbytes, dtype=torch.uint8)
        found = []
        for _ in range(15):
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(ROUNDS):
                for _ in range(5):
                    a @ a
                if nbytes:
                    dist.all_to_all_single(y, x, of, to)
            dist.barrier()
            found.append((time.perf_counter() - begin) / ROUNDS)
        times[nbytes] = statistics.median(found)
    return max(0.0, times[8] - times[0]), (times[1 << 22] - times[8]) / (1 << 22)


def gloo(n: int) -> Network:
    """The link between n processes."""
    if n == 1:
        return Network(Link(0.0, 1e12), Link(0.0, 1e12))
    pool = Pool(n)
    latency, per_byte = map(max, zip(*pool.run(link), strict=True))
    pool.close()
    one = Link(latency, 1 / max(per_byte, 1e-12))
    return Network(one, one)


class Crowd:
    """n processes, each of which rehearses a rank at the same time as the others."""

    def __init__(self, n: int) -> None:
        context = mp.get_context("spawn")
        self.n, self.network = n, gloo(n)
        start = (context.Barrier(n),)
        self.workers = ProcessPoolExecutor(n, context, initializer=_meet, initargs=start)

    def predicted(self, name: str, rows: int) -> float:
        """Seconds of the slowest rank's step: its work beside the others', and its messages."""
        ranks = range(self.n)
        found = self.workers.map(
            _beside, [name] * self.n, [rows] * self.n, [self.n] * self.n, ranks
        )
        return max(one.seconds + one.communication(self.network) for one in found)


_barrier: Any = None


def _meet(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _beside(name: str, rows: int, n: int, rank: int) -> Rehearsal:
    _barrier.wait(60)
    return rehearse(prepare(name, rows), n, rank, repeats=2 * REPEATS)


def rehearsed(name: str, rows: int, n: int) -> Rehearsal:
    return rehearse(prepare(name, rows), n, n // 2, repeats=REPEATS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--measure", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rehearse", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    print(f"{CORES} cores; torch {torch.__version__}, 1 thread a rank")
    crowds = {n: Crowd(n) for n in options.measure}
    for n, crowd in crowds.items():
        here = crowd.network.inner
        print(f"gloo, {n} ranks: {1e6 * here.latency:.0f} us, {here.bandwidth / 1e9:.2f} GB/s")
    heads = "model", "scaling", "ranks", "ms", "MiB", "alone ms", "MiB", "sent MB", "pred/meas"
    print("{:6} {:7} {:>5} {:>9} {:>7} {:>9} {:>7} {:>8} {:>10}".format(*heads), " projected ms")
    rows = []
    for name in options.models:
        for n in sorted({*options.measure, *options.rehearse}):
            for kind in ("strong", "weak"):
                size = options.rows if kind == "strong" else options.rows * n
                if (kind == "weak" and n == 1) or size // n < 8 or (kind, name) in _SKIPPED:
                    continue
                row = line(name, kind, n, size, crowds.get(n))
                rows.append(row)
    extend(options.csv, rows)
    if options.picture:
        draw(rows, options.rows, options.picture)


def draw(rows: list[list[Any]], size: int, file: Path) -> None:
    """Speed-up (strong) and efficiency (weak) against ranks: measured, and rehearsed with links."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, kind in zip(axes, ("strong", "weak"), strict=True):
        for colour, name in enumerate(dict.fromkeys(r[0] for r in rows)):
            mine = [r for r in rows if r[0] == name and r[1] in (kind, "strong"[: 6 * (r[2] == 1)])]
            mine = sorted(mine, key=lambda r: r[2])
            if len(mine) < 2:
                continue
            one, alone = mine[0][3], mine[0][5]

            def gain(n: int, base: float, ms: float, kind: str = kind) -> float:
                return base / ms if kind == "strong" else 100 * base / ms

            real = [(r[2], gain(r[2], one, r[3])) for r in mine if r[3] == r[3]]
            style = dict(color=f"C{colour}")
            ax.plot(*zip(*real, strict=True), "o-", label=f"{name}, measured", **style)
            ranks = [r[2] for r in mine]
            low, high = ([gain(r[2], alone, r[i]) for r in mine] for i in (10, 9))
            ax.plot(ranks, high, "--", label=f"{name}, rehearsed", **style)
            ax.fill_between(ranks, low, high, alpha=0.2, **style)
        ax.set_xscale("log", base=2)
        ax.set_xlabel(f"ranks (measured: more than {CORES} share {CORES} cores)")
        ax.grid(alpha=0.3)
    most = max(r[2] for r in rows)
    axes[0].plot([1, most], [1, most], "k:", label="ideal")
    axes[0].set_yscale("log", base=2)
    axes[0].set_title(f"Strong scaling: {size} rows in all")
    axes[0].set_ylabel("speed-up of a training step")
    axes[1].axhline(100, color="k", ls=":")
    axes[1].set_title(f"Weak scaling: {size} rows a rank")
    axes[1].set_ylabel("efficiency (%)")
    axes[1].set_ylim(0, 120)
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=110)


# every token sees every other: a rank's work grows with the ranks
_SKIPPED = {("weak", "ViT"), ("weak", "DiT")}


def line(name: str, kind: str, n: int, size: int, crowd: Crowd | None) -> list[Any]:
    """Measure, rehearse and print one row."""
    ms = mib = ratio = float("nan")
    if crowd is not None:
        pool = Pool(n)
        found = pool.run(measured, name, size)
        pool.close()
        ms, mib = 1e3 * max(t for t, _ in found), max(p for _, p in found) / 2**20
        ratio = 1e3 * crowd.predicted(name, size) / ms
    one = rehearsed(name, size, n)
    low, high = (1e3 * t for t in one.projected(DGX_H100))
    sent = sum(s.bytes for s in one.sent) / 1e6
    label = f"{n}*" if n > CORES and crowd is not None else f"{n}"
    print(
        f"{name:6} {kind:7} {label:>5} {ms:9.1f} {mib:7.1f} {1e3 * one.seconds:9.1f} "
        f"{one.peak / 2**20:7.1f} {sent:8.2f} {ratio:10.2f}   {low:.1f} to {high:.1f}",
        flush=True,
    )
    return [name, kind, n, ms, mib, 1e3 * one.seconds, one.peak, sent, ratio, low, high]


if __name__ == "__main__":
    main()

"""Strong and weak scaling to thousands of ranks, by the model of `shardtensor plan`.

    OMP_NUM_THREADS=1 python benchmarks/projected.py [--cases U-Net ...] [--ranks 2 8 64 512 4096]
        [--jitter 0.02] [--csv FILE]

One rank's step (forward, backward, optimizer) on fake tensors: its kernels by an H100's peaks, at
least 5 us each, its messages by the links of DGX H100 nodes. Efficiency: one device's time of the
same model, were its memory large enough, over the ranks' together (strong) or over a rank's (weak),
between no communication hidden and all of it. Ranks that meet wait for the slowest of them: where a
rank's time between two meetings varies by a standard deviation of `--jitter` of it, as long as the
largest of so many draws takes. limit: the largest of what a rank spends beyond its share,

    launches    kernels too small for the device, which take what a launch takes
    work        what ranks compute or move beyond their share (halos, whole weights, copies)
    latency, bytes    of messages
    waiting     for the slowest rank

Fake tensors have no device: the merges of a ring's blocks count as plain ops, of which GPUs run
fewer. The graph is a cube of 27-point stencils in
parts of equal size along a Morton curve: the rows that `Topology.gather` sends and `scatter` sends
back are counted from it, and its layers run on a shard.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from bench_models import UNet, ViT
from tables import extend
from torch import Tensor, nn

from shardtensor.comm.counters import Sent
from shardtensor.observe.network import DGX_H100, Link, Network
from shardtensor.plan.estimate import H100, Layout, Task, estimate
from shardtensor.train.options import Options

WIDTH, LAYERS = 128, 15


# what ops would take that are launched in no time
AT_ONCE = replace(H100, launch=0.0)


class Spectral3d(nn.Module):
    """A layer of a Fourier neural operator in three dims, as it is usually written."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        shape = width, width, modes, modes, modes
        self.weights = nn.ParameterList(
            torch.randn(shape, dtype=torch.cfloat) / width**2 for _ in range(4)
        )
        self.skip, self.modes = nn.Conv3d(width, width, 1), modes

    def forward(self, x: Tensor) -> Tensor:
        m = self.modes
        y = torch.fft.rfftn(x, dim=(-3, -2, -1))
        out = torch.zeros_like(y)
        ends = slice(0, m), slice(-m, None)
        corners = ((a, b) for a in ends for b in ends)
        for (a, b), w in zip(corners, self.weights, strict=True):
            part = y[:, :, a, b, :m]
            out[:, :, a, b, :m] = torch.einsum("bixyz,ioxyz->boxyz", part, w)
        return F.gelu(torch.fft.irfftn(out, s=x.shape[-3:], dim=(-3, -2, -1)) + self.skip(x))


def fno3d(width: int = 32, modes: int = 16, depth: int = 4) -> nn.Module:
    layers = (Spectral3d(width, modes) for _ in range(depth))
    return nn.Sequential(nn.Conv3d(4, width, 1), *layers, nn.Conv3d(width, 4, 1))


def vit(shape: tuple[int, ...]) -> nn.Module:
    """The paper's: patches of 16, width 768, 12 heads; two of its twelve layers."""
    return ViT(shape, 16, 3, 3, width=768, depth=2, heads=12)


class Case(NamedTuple):
    """make(shape), channels, dims; side of the whole (strong), of a rank's part (weak)."""

    make: Callable[[tuple[int, ...]], nn.Module]
    channels: int
    dims: int
    side: int
    part: int
    precision: str | None = None


CASES = {
    "ViT": Case(vit, 3, 2, 2048, 256, "bf16"),
    "U-Net": Case(lambda shape: UNet(4, 4, width=64, depth=4), 4, 2, 2048, 512),
    "FNO 3-D": Case(lambda shape: fno3d(), 4, 3, 512, 64),
}


class Parts(NamedTuple):
    """Seconds of a step of one rank. work: without least times; launches: what these add."""

    work: float
    launches: float
    latency: float
    bytes: float
    waiting: float
    meetings: int
    peak: float

    @property
    def slow(self) -> float:
        """Of a step that hides no message."""
        return self.work + self.launches + self.latency + self.bytes + self.waiting

    @property
    def fast(self) -> float:
        """Of a step that hides all of them."""
        compute = self.work + self.launches + self.waiting
        return max(compute, self.latency + self.bytes)

    def limit(self, share: float) -> str:
        """What a step spends most on beyond its share of one device's work."""
        beyond = self._asdict() | {"work": self.work - share}
        names = ("work", "launches", "latency", "bytes", "waiting")
        return max(names, key=lambda k: beyond[k])


def slowest(ranks: int) -> float:
    """The largest of so many normal draws, in standard deviations (Blom 1958)."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0


def wire(sent: Sequence[Sent]) -> tuple[float, float]:
    """(seconds of latency, of bytes)."""
    far = DGX_H100.node
    endless = Network(Link(DGX_H100.inner.latency, 1e30), Link(DGX_H100.outer.latency, 1e30), far)
    latency = sum(endless.seconds(s) for s in sent)
    return latency, sum(DGX_H100.seconds(s) for s in sent) - latency


def parts(task: Task, layout: Layout, jitter: float, sent: Sequence[Sent] | None = None) -> Parts:
    """Of one rank's step; sent: in place of what the task sends."""
    found, least = (estimate(task, layout, device) for device in (H100, AT_ONCE))
    if found.refused:
        raise RuntimeError(found.refused)
    sent = found.sent if sent is None else sent
    share = found.compute / max(1, len(sent))
    waiting = sum(jitter * share * slowest(min(s.ranks, s.messages + 1)) for s in sent)
    launches = found.compute - least.compute
    return Parts(least.compute, launches, *wire(sent), waiting, len(sent), found.peak)


def cut(n: int, dims: int) -> tuple[int, ...]:
    """n ranks along the first one or two dims, as square as powers of two allow."""
    first = 1 << (n.bit_length() // 2)
    return (n,) if dims == 1 or n < 16 else (first, n // first)


def rank_of(case: Case, shape: tuple[int, ...], n: int, jitter: float) -> Parts:
    """What one rank of n does in a step of an input of this shape, cut as takes least time."""
    task = Task(lambda: case.make(shape[2:]), [(1, case.channels, *shape[2:])])
    options = Options(precision=case.precision)
    # one dim has rows for so many ranks only
    ways = {cut(n, case.dims), (n,)} if n <= 64 else {cut(n, case.dims)}
    layouts = (Layout(1, tuple(range(2, 2 + len(way))), way, options) for way in ways)
    return min((parts(task, layout, jitter) for layout in layouts), key=lambda p: p.slow)


# graph -------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer of MeshGraphNet (Pfaff et al. 2021) on the nodes and edges of one rank."""

    def __init__(self) -> None:
        super().__init__()
        mlp = lambda n: nn.Sequential(  # noqa: E731
            nn.Linear(n * WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        )
        self.edge, self.node = mlp(3), mlp(2)

    def forward(self, x: Tensor, e: Tensor, degree: int) -> tuple[Tensor, Tensor]:
        ends = x.repeat_interleave(degree, 0)[: e.shape[0]]
        e = e + self.edge(torch.cat((e, ends, ends), -1))
        total = e.view(-1, degree, WIDTH).sum(1)
        return x + self.node(torch.cat((x, total), -1)), e


class Net(nn.Module):
    def __init__(self, nodes: int, degree: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.nodes, self.degree = nodes, degree

    def forward(self, x: Tensor) -> Tensor:
        x = x[0]
        e = x.repeat_interleave(self.degree, 0)
        for layer in self.layers:
            x, e = layer(x, e, self.degree)
        return x


def halo(nodes: int, n: int) -> tuple[int, int, int]:
    """(rows, foreign rows that a middle rank reads, ranks that it reads of) of a cube cut in n."""
    side = round(nodes ** (1 / 3))
    at = np.indices((side,) * 3, dtype=np.int64).reshape(3, -1)
    key = np.zeros(at.shape[1], np.int64)
    for bit in range(side.bit_length()):
        for d in range(3):
            key |= ((at[d] >> bit) & 1) << (3 * bit + d)
    order = np.argsort(key)
    owner = np.empty(side**3, np.int32)
    per = -(-(side**3) // n)
    owner[order] = np.arange(side**3) // per
    mine = np.flatnonzero(owner == n // 2)
    x, y, z = at[:, mine]
    reads = np.zeros(side**3, bool)
    for dx, dy, dz in np.ndindex(3, 3, 3):
        u, v, w = x + dx - 1, y + dy - 1, z + dz - 1
        inside = (np.minimum(np.minimum(u, v), w) >= 0) & (np.maximum(np.maximum(u, v), w) < side)
        reads[((u * side + v) * side + w)[inside]] = True
    reads[mine] = False
    read = np.flatnonzero(reads)
    return per, len(read), len(np.unique(owner[read]))


def graph(nodes: int, n: int, jitter: float) -> Parts:
    """One rank of n with its nodes, 26 edges each."""
    # the part of a rank among many is that of one among fewer, of a cube that fits here
    among = min(n, 10**7 * n // nodes)
    rows, foreign, peers = (nodes, 0, 0) if n == 1 else halo(nodes * among // n, among)
    task = Task(lambda: Net(rows, 26), [(1, rows, WIDTH)], dims=(1,))
    size = 4 * WIDTH * foreign
    weights = sum(p.numel() for p in Net(1, 1).parameters())
    # rows there, their gradients back; weights' gradients in one bucket
    each = Sent("fetch", size, peers, n, "gather")
    sent = [each] * (2 * LAYERS) + [
        Sent("all_reduce", 8 * weights * (n - 1) // n, 2 * (n - 1), n, "bucket")
    ]
    return parts(task, Layout(1, (), ()), jitter, sent if n > 1 else [])


# tables ------------------------------------------------------------------------------------------


def shape_of(case: Case, n: int, kind: str) -> tuple[int, ...]:
    if kind == "strong":
        return (1, case.channels, *[case.side] * case.dims)
    cuts = cut(n, case.dims)
    sides = [case.part * c for c in (*cuts, 1)[:2]] + [case.side] * (case.dims - 2)
    return (1, case.channels, *sides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "graph"], default=[*CASES, "graph"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64, 512, 4096])
    parser.add_argument("--jitter", type=float, default=0.02)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    heads = ["case", "scaling", "ranks", "step ms", "efficiency", "work", "launch", "latency"]
    print("{:8} {:7} {:>6} {:>16} {:>13} {:>9} {:>8} {:>8}".format(*heads), end="")
    print(f" {'bytes':>8} {'waits':>8} {'meets':>6} {'GiB':>7}  limit")
    rows = []
    for name in options.cases:
        for kind in ("strong", "weak"):
            row = table(name, kind, options.ranks, options.jitter)
            rows += row
    extend(options.csv, rows)


def table(name: str, kind: str, ranks: Sequence[int], jitter: float) -> list[Any]:
    """Print and return the rows of one case, of one kind of scaling."""
    case = CASES.get(name)
    rows: list[Any] = []
    one: Parts | None = None
    for n in (1, *ranks):
        try:
            if case is None:
                nodes = 10**7 if kind == "strong" else 20_000 * n
                here = graph(nodes, n, jitter)
            else:
                here = rank_of(case, shape_of(case, n, kind), n, jitter)
        except RuntimeError as e:
            print(f"{name:8} {kind:7} {n:6} {e}", flush=True)
            continue
        one = one or here
        by = n if kind == "strong" else 1
        low, high = (one.slow / by / t for t in (here.slow, here.fast))
        limit = here.limit(one.work / by) if n > 1 else ""
        ms = [1e3 * v for v in (here.work, here.launches, here.latency, here.bytes, here.waiting)]
        print(
            f"{name:8} {kind:7} {n:6} {1e3 * here.fast:7.2f} {1e3 * here.slow:8.2f} "
            f"{low:6.2f} {high:6.2f} {ms[0]:9.2f} {ms[1]:8.2f} {ms[2]:8.2f} {ms[3]:8.2f} "
            f"{ms[4]:8.2f} {here.meetings:6} {here.peak / 2**30:7.2f}  {limit}",
            flush=True,
        )
        rows.append([name, kind, n, here.fast, here.slow, low, high, *ms, here.meetings, limit])
    return rows


if __name__ == "__main__":
    main()

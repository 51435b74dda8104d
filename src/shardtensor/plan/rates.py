"""What ops take on this CPU, by class, measured until it is stable; and whether it is busy."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from math import prod
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import renewed
from .device import Rate, Rates
from .step.kinds import LARGE, class_of, inside

# bytes of what ops read and make before one of them is met again, as in a step
SPAN = 128e6
# ops in a turn, and seconds of one, at most
TURN, LONG = 400, 0.05
# bytes of a tensor that the C library's allocator keeps when it is released
KEPT = 30_000_000
PINS = 3
# a measurement is stable when its three shortest batches are as close as this
CLOSE = 0.05
# seconds of a batch, and of a measurement at most
BATCH, MOST = 4e-3, 0.6
# how much longer than the shortest the usual time of a quiet machine is, and than its CPU time
SLOWER, WAITED = 1.25, 1.1
# of a fit
STEPS = 20

# of a process's own time one rank can be judged on a busy machine
clock = time.perf_counter
# makes what is run; FLOP; bytes that it reads and writes
Work = tuple[Callable[[], Callable[[], Any]], float, float]


def steady(run: Callable[[], Any]) -> tuple[float, bool]:
    """Seconds of a call, and whether that is stable; all ranks begin each batch together."""
    run()
    begin = clock()
    run()
    count = max(1, int(BATCH / max(clock() - begin, 1e-7)))
    batches: list[float] = []
    until = time.perf_counter() + MOST
    while True:
        _meet()
        begin = clock()
        for _ in range(count):
            run()
        batches.append((clock() - begin) / count)
        best = sorted(batches)[:3]
        stable = len(batches) >= 5 and best[-1] <= best[0] * (1 + CLOSE)
        # all ranks take as many batches as the slowest
        if not most([float(not stable and time.perf_counter() <= until)])[0]:
            return best[0], stable


def _several() -> bool:
    """Whether other ranks are at work, too."""
    return dist.is_initialized() and dist.get_world_size() > 1


def _meet() -> None:
    """Wait for all ranks."""
    if _several():
        dist.barrier()


def most(values: list[float]) -> list[float]:
    """Of the slowest rank."""
    if not _several():
        return values
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def load(seconds: float = 0.6) -> tuple[list[float], float, float]:
    """A loop of equal work: the time of each turn, of all on the clock, of all on the processor."""
    a = torch.ones(192, 192)
    times = list[float]()
    begin, cpu = time.perf_counter(), time.process_time()
    while (now := time.perf_counter()) < begin + seconds:
        for _ in range(8):
            a @ a
        times.append(time.perf_counter() - now)
    return times, time.perf_counter() - begin, time.process_time() - cpu


def busy(times: Sequence[float], wall: float, cpu: float) -> str:
    """Why a machine is busy, by what `load` found; "" if it is quiet."""
    usual, best = median(times), min(times)
    if usual > SLOWER * best:
        return f"the same work takes {1e3 * best:.2f} ms, but usually {1e3 * usual:.2f} ms"
    if wall > WAITED * cpu:
        return f"a process that only computes waits {1 - cpu / wall:.0%} of the time for a core"
    return ""


class New(NamedTuple):
    """Memory that is new: seconds of a byte; of columns that are made and given back its share."""

    seconds: float
    share: float


def measure() -> tuple[dict[str, Rate], New, list[str]]:
    """Rates by class, of all ranks at work at once; of new memory; why they are not to be kept.

    Called on every rank; the same on all.
    """
    # before memory is at hand
    share = renewed.share(dist.get_world_size() if _several() else 1)
    reasons = [busy(*load())]
    found: dict[str, list[tuple[float, float, float]]] = {}
    unstable, count = 0, 0
    fresh = _of_fresh()
    _keep_memory()
    for kind, (make, flop, moved) in _samples():
        seconds, stable = _among_others(make, moved)
        found.setdefault(kind, []).append((flop, moved, seconds))
        unstable, count = unstable + (not stable), count + 1
    reasons.append(busy(*load()))
    if unstable > count / 5:
        reasons.append(f"{unstable} of {count} measurements did not become stable")
    *worst, fresh, share = most([s for rows in found.values() for _, _, s in rows] + [fresh, share])
    told = most([float(bool(r)) for r in reasons])
    times = iter(worst)
    rates = {}
    for kind, rows in found.items():
        rows = [(flop, moved, next(times)) for flop, moved, _ in rows]
        rates[kind] = fitted(rows) if any(flop for flop, _, _ in rows) else between(rows)
    why = [r or "another rank's core is busy" for r, t in zip(reasons, told, strict=False) if t]
    return rates, New(fresh, share), list(dict.fromkeys(why))


def _keep_memory() -> None:
    """Let the allocator keep what is released, as it does after a model's first step."""
    held = [torch.zeros(KEPT // 4) for _ in range(2)]
    del held


def _among_others(make: Callable[[], Callable[[], Any]], moved: float) -> tuple[float, bool]:
    """Seconds of an op as in a step: on what no cache holds; what it gives is kept for a while."""
    first = make()
    first()
    begin = clock()
    first()
    often = LONG / max(clock() - begin, 1e-7)
    ops = [first, *(make() for _ in range(int(min(SPAN // moved, often, TURN)) or 1))]
    pins = list[Tensor]()

    def turn() -> None:
        kept = [op() for op in ops]
        if len(pins) < PINS:
            # the allocator returns what is at the end of its memory: let that not be ours
            pins.append(torch.empty(64))
        del kept

    turn()
    seconds, stable = steady(turn)
    return seconds / len(ops), stable


def _of_fresh() -> float:
    """Seconds of a byte of memory that is new, beyond those of one that was used before."""
    n = LARGE // 2
    old = torch.zeros(n)
    used, _ = steady(old.zero_)
    new, _ = steady(lambda: torch.empty(n).zero_())
    return max(0.0, new - used) / old.nbytes


def between(rows: Sequence[tuple[float, float, float]]) -> Rate:
    """Of ops that are bound by memory: through the points that were measured."""
    at: dict[float, list[float]] = {}
    for _, moved, seconds in rows:
        at.setdefault(moved, []).append(seconds)
    points = sorted((moved, sum(took) / len(took)) for moved, took in at.items())
    # more bytes take no less time
    for i in range(1, len(points)):
        points[i] = points[i][0], max(points[i][1], points[i - 1][1])
    return Rate(tuple(points))


def fitted(rows: Sequence[tuple[float, float, float]]) -> Rate:
    """Of ops that compute: least + FLOP x f + bytes x b, by the logarithm of what it is off by, so
    that half counts as much as twice; none below 0."""
    table = torch.tensor(rows, dtype=torch.float64)
    flop, moved, seconds = table.unbind(1)
    columns = torch.stack([torch.ones_like(flop), flop, moved], 1)
    best, error = torch.zeros(3, dtype=torch.float64), float("inf")
    for used in (c for n in (1, 2, 3) for c in combinations(range(3), n)):
        part, now = columns[:, used], seconds
        for _ in range(STEPS):
            # Gauss-Newton: log(now) is linear near what it is
            wanted = 1 + (seconds / now).log()
            solved = torch.linalg.lstsq(part / now[:, None], wanted[:, None]).solution[:, 0]
            now = part @ solved
            if (solved < 0).any() or (now <= 0).any():
                break
            off = float((now / seconds).log().square().sum())
            if off < error:
                best, error = torch.zeros(3, dtype=torch.float64), off
                best[list(used)] = solved
    least, by_flop, by_byte = best.tolist()
    return Rate(((0.0, least), (1e9, least + 1e9 * by_byte)), by_flop)


def _samples() -> Iterator[tuple[str, Work]]:
    """(class, (what makes it, FLOP, bytes)), as the ledger of a plan counts them."""
    for m, k, n in _PRODUCTS:
        moved, work = 4.0 * (m * k + k * n + m * n), 2.0 * m * k * n
        yield "gemm", (_on(_product, (m, k), (n, k)), work, moved)
        yield "gemm, added", (_on(_linear, (m, k), (n, k), (n,)), work, moved)
        # as of the gradient of a weight
        yield "gemm", (_on(_weights, (k, m), (k, n)), work, moved)
    shapes = (24, 256, 32), (24, 32, 256)
    yield (
        "gemm",
        (_on(torch.bmm, *shapes), 2.0 * 24 * 256 * 32 * 256, 4.0 * 24 * (2 * 256 * 32 + 256**2)),
    )
    for batch, rows, width in ((144, 2, 16), (256, 8, 32)):
        moved = 8.0 * batch * (2 * rows * width + width**2)
        work = 2.0 * batch * rows * width**2
        yield "gemm, complex", (_modes(batch, rows, width), work, moved)
    for shape, out, size, stride, groups in _CONVS:
        yield from _conv(shape, out, size, stride, groups)
    for shape in ((1, 4, 256, 32), (2, 4, 512, 16), (1, 4, 1024, 32), (4, 8, 196, 64)):
        yield from _attention(shape)
    for rows in (64, 1024, 16384):
        for part, norm in _ROWS.items():
            yield from _norm(part, norm, (rows, 256))
    for side in (8, 48, 192):
        for part, norm in _IMAGES.items():
            yield from _norm(part, norm, (1, 32, side, side))
    for n in (1 << 8, 1 << 13, 1 << 17, 1 << 20, 7 << 20):
        grid, side = (n // 64, 64), 1 << min(8, n.bit_length() // 2)
        image = n // side**2 or 1, side, side
        yield "pointwise", (_on(torch.mul, (n,), (n,)), 0.0, 12.0 * n)
        yield "function", (_on(F.gelu, (n,)), 0.0, 8.0 * n)
        yield "function, backward", (_on(torch.ops.aten.gelu_backward, (n,), (n,)), 0.0, 12.0 * n)
        yield "reduce", (_on(partial(torch.sum, dim=0), (n // 256, 256)), 0.0, 4.0 * n)
        yield "copy, strided", (_on(lambda x: x.t().contiguous(), grid), 0.0, 8.0 * n)
        yield "copy", (_on(torch.clone, (n,)), 0.0, 8.0 * n)
        if n < 1 << 22:
            at = torch.randint(grid[0], (grid[0],))
            yield "index", (_on(lambda x, at=at: x[at], grid), 0.0, 8.0 * n)
            half = torch.fft.rfft2(torch.rand(image))
            yield "fft, real", (_on(torch.fft.rfft2, image), 0.0, 9.0 * n)
            yield "fft, inverse", (_of(torch.fft.irfft2, half), 0.0, 9.0 * n)
            yield "fft", (_of(partial(torch.fft.fft, dim=-2), half), 0.0, 9.0 * n)


_PRODUCTS = (64, 64, 64), (256, 256, 256), (4096, 96, 96), (1024, 768, 768), (512, 2048, 512)
_SCALES = torch.ones(256, requires_grad=True), torch.zeros(256, requires_grad=True)
_ROWS: dict[str, Any] = {
    "": lambda x: F.layer_norm(x, (256,), *_SCALES),
    ", softmax": partial(F.softmax, dim=-1),
}
_IMAGES: dict[str, Any] = {
    ", batch": lambda x: F.batch_norm(x, None, None, training=True),
    ", group": partial(F.group_norm, num_groups=4),
}
# shape, channels out, size, stride, groups
_CONVS = (
    ((1, 16, 128, 128), 16, 3, 1, 1),
    ((1, 32, 96, 96), 32, 3, 1, 1),
    ((1, 64, 64, 64), 64, 3, 1, 1),
    ((1, 64, 64, 64), 128, 3, 2, 1),
    ((1, 256, 16, 16), 256, 3, 1, 1),
    ((2, 4, 96, 256), 16, 3, 1, 1),
    ((1, 3, 128, 128), 96, 4, 4, 1),
    ((2, 4, 64, 64), 64, 8, 8, 1),
    ((1, 16, 128, 256), 16, 1, 1, 1),
    ((1, 64, 64, 64), 256, 1, 1, 1),
    ((1, 256, 32, 32), 64, 1, 1, 1),
    ((1, 4, 32, 32), 16, 3, 1, 1),
    ((1, 64, 16, 16), 64, 3, 1, 1),
    ((1, 16, 32, 32), 16, 3, 1, 1),
    ((1, 2, 32, 32, 32), 16, 3, 1, 1),
    ((1, 16, 16, 32, 32), 16, 3, 1, 1),
    ((1, 32, 16, 16, 16), 32, 3, 1, 1),
    ((2, 16, 24, 32, 32), 16, 3, 1, 1),
    ((2, 32, 16, 24, 24), 32, 3, 1, 1),
    ((1, 64, 64, 64), 64, 3, 1, 64),
    ((1, 64, 64, 64), 64, 7, 1, 64),
    ((1, 192, 32, 32), 192, 7, 1, 192),
)


def _on(op: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[], Callable[[], Any]]:
    return lambda: partial(op, *map(torch.rand, shapes))


def _of(op: Callable[..., Any], x: Tensor) -> Callable[[], Callable[[], Any]]:
    return lambda: partial(op, x.clone())


def _backward(op: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Callable[[], Any]:
    """Makes what runs an op's gradients of all its arguments."""

    def make() -> Callable[[], Any]:
        given = [torch.rand(shape, requires_grad=True) for shape in shapes]
        y = op(*given)
        return partial(torch.autograd.grad, y, given, torch.ones_like(y), retain_graph=True)

    return make


def _norm(part: str, norm: Callable[..., Tensor], shape: tuple[int, ...]) -> Iterator[Any]:
    held = 4.0 * prod(shape)
    yield f"norm{part}", (_on(norm, shape), 0.0, 2 * held)
    yield f"norm backward{part}", (_backward(norm, shape), 0.0, 3 * held)


def _product(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x, w.t())


def _linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b, x, w.t())


def _weights(x: Tensor, y: Tensor) -> Tensor:
    return torch.mm(x.t(), y)


def _modes(batch: int, rows: int, width: int) -> Callable[[], Callable[[], Any]]:
    """A product of Fourier modes, as an einsum over channels lays them out."""

    def make() -> Callable[[], Any]:
        a, b = (torch.rand(n, width, batch, dtype=torch.cfloat) for n in (rows, width))
        return partial(torch.bmm, a.permute(2, 0, 1), b.permute(2, 0, 1))

    return make


def _conv(
    shape: tuple[int, ...], out: int, size: int, stride: int, groups: int
) -> Iterator[tuple[str, Work]]:
    dims = len(shape) - 2
    weight = (out, shape[1] // groups, *[size] * dims)
    conv: Any = {2: F.conv2d, 3: F.conv3d}[dims]
    op = partial(conv, stride=stride, padding=size // 2 if stride == 1 else 0, groups=groups)
    x, w = torch.rand(shape), torch.rand(weight)
    y = op(x, w)
    zeros, ones = [0] * dims, [1] * dims
    args = x, w, None, [stride] * dims, [op.keywords["padding"]] * dims, ones, False, zeros, groups
    kind = class_of(torch.ops.aten.convolution.default, args)
    flop = 2.0 * y.numel() * prod(weight[1:])
    besides = inside(torch.ops.aten.convolution.default, args, kind)
    moved = 4.0 * (prod(shape) + prod(weight) + y.numel()) + besides
    yield kind, (_on(op, shape, weight), flop, moved)
    back = 4.0 * (2 * prod(shape) + 2 * prod(weight) + y.numel()) + besides
    yield kind.replace("conv", "conv backward"), (_backward(op, shape, weight), 2 * flop, back)


def _attention(shape: tuple[int, ...]) -> Iterator[tuple[str, Work]]:
    b, h, n, d = shape
    op, product, size = F.scaled_dot_product_attention, 2.0 * b * h * n * n * d, 4.0 * b * h * n * d
    scores = 4.0 * b * h * n * n
    yield "attention", (_on(op, shape, shape, shape), 2 * product, 4 * size + scores)
    back = _backward(op, shape, shape, shape)
    yield "attention backward", (back, 5 * product, 8 * size + scores)


def rates(classes: dict[str, Rate], ranks: int, new: New, launch: float = 0.0) -> Rates:
    """These, of this host and as many threads as this process has."""
    return Rates(socket.gethostname(), ranks, torch.get_num_threads(), classes, launch, *new)

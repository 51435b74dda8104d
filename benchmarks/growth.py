"""How the cost of one op on one rank grows with the number of ranks, by counts and CPU time.

    OMP_NUM_THREADS=1 python benchmarks/growth.py [--ops conv swap ...] [--ranks 2 8 64 512 4096]

Every row is one rank of N, alone (`shardtensor.rehearse`'s silent world), with shards of the same
size for every N: CPU microseconds of the first call (cold: specs and plans are made) and of later
ones (warm, median), and of a warm call the kernels that it runs, messages and bytes that it sends,
and the Python and C functions that Python calls. To add an op is to add a line to OPS.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Shard
from torch.profiler import ProfilerActivity, profile

import shardtensor as st
from shardtensor import cache
from shardtensor._torch.world import silent_world
from shardtensor.attention.strategy import strategy
from shardtensor.comm import groups, together

REPEATS = 15
KERNEL = torch.randn(4, 4, 4, 4)
# what the profiler shows of ops that run no kernel
VIEWS = {
    "alias", "as_strided", "chunk", "detach", "expand", "flatten", "movedim", "narrow", "permute",
    "reshape", "resolve_conj", "resolve_neg", "select", "slice", "split", "split_with_sizes",
    "squeeze", "swapaxes", "t", "transpose", "unflatten", "unsqueeze", "view", "view_as", "empty",
    "empty_like", "empty_strided", "new_empty", "resize_", "result_type", "set_", "is_nonzero",
    "lift_fresh", "_reshape_alias", "unbind", "unfold", "item", "_local_scalar_dense", "to",
    "contiguous", "unsafe_split", "requires_grad_",
}  # fmt: skip


class Cost(NamedTuple):
    """Of one call: CPU microseconds cold and warm, and counts of a warm call."""

    cold: float
    warm: float
    kernels: int
    messages: int
    bytes: int
    calls: int


def shards(mesh: DeviceMesh, shape: tuple[int, ...], dim: int, rows: int) -> st.ShardTensor:
    """Random shards of `rows` rows of dim, of which nothing of global size is made."""
    shape = (*shape[:dim], rows, *shape[dim + 1 :])
    local = torch.randn(shape)
    return st.ShardTensor.from_local(local, mesh, [Shard(dim)], {dim: [rows] * mesh.size()})


def conv(mesh: DeviceMesh) -> Callable[[], Any]:
    x, w = shards(mesh, (1, 4, 0, 8), 2, 4), torch.randn(4, 4, 3, 3)
    return lambda: F.conv2d(x, w, padding=1)


def conv_strided(mesh: DeviceMesh) -> Callable[[], Any]:
    x, w = shards(mesh, (1, 4, 0, 8), 2, 5), torch.randn(4, 4, 3, 3)
    return lambda: F.conv2d(x, w, stride=2, padding=1)


def conv_both_ways(mesh: DeviceMesh) -> Callable[[], Any]:
    x, w = shards(mesh, (1, 4, 0, 8), 2, 4), torch.randn(4, 4, 3, 3, requires_grad=True)
    x.requires_grad_()
    return lambda: F.conv2d(x, w, padding=1).sum().backward()


def norm(make: Callable[[int], nn.Module], backward: bool) -> Callable[[DeviceMesh], Any]:
    """make: a norm of an image (2, 16, H, 32) that is cut along H, by H."""

    def prepare(mesh: DeviceMesh) -> Callable[[], Any]:
        x, module = shards(mesh, (2, 16, 0, 32), 2, 4).requires_grad_(), make(4 * mesh.size())
        g = torch.randn_like(x._local)

        def run() -> Any:
            y = module(x)
            if backward:
                y._local.backward(g)

        return run

    return prepare


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": lambda rows: nn.BatchNorm2d(16),
    "group norm": lambda rows: nn.GroupNorm(4, 16),
    "instance norm": lambda rows: nn.InstanceNorm2d(16, affine=True),
    "layer norm": lambda rows: nn.LayerNorm((16, rows, 32), elementwise_affine=False),
    "rms norm": lambda rows: nn.RMSNorm((16, rows, 32), elementwise_affine=False),
}


def swap(mesh: DeviceMesh) -> Callable[[], Any]:
    x = shards(mesh, (0, mesh.size()), 0, 4)
    return lambda: x.redistribute(placements=[Shard(1)])


def narrow(mesh: DeviceMesh) -> Callable[[], Any]:
    x = shards(mesh, (0, 8), 0, 4)
    return lambda: x[1:-1]


def roll(mesh: DeviceMesh) -> Callable[[], Any]:
    x = shards(mesh, (0, 8), 0, 4)
    return lambda: x.roll(1, 0)


def from_local(mesh: DeviceMesh) -> Callable[[], Any]:
    local = torch.randn(4, 8)
    return lambda: st.ShardTensor.from_local(local, mesh, [Shard(0)])


def on_image(op: Callable[[Any], Any], rows: int = 4) -> Callable[[DeviceMesh], Callable[[], Any]]:
    """An op of an image (1, 4, rows of all ranks, 8)."""

    def made(mesh: DeviceMesh) -> Callable[[], Any]:
        x = shards(mesh, (1, 4, 0, 8), 2, rows)
        return lambda: op(x)

    return made


def uneven(mesh: DeviceMesh) -> Callable[[], Any]:
    """A convolution of shards of 4 and 5 rows in turn."""
    n = mesh.size()
    sizes = [4 + r % 2 for r in range(n)]
    local = torch.randn(1, 4, sizes[n // 2], 8)
    x = st.ShardTensor.from_local(local, mesh, [Shard(2)], {2: sizes})
    w = torch.randn(4, 4, 3, 3)
    return lambda: F.conv2d(x, w, padding=1)


def recut(mesh: DeviceMesh) -> Callable[[], Any]:
    x, sizes = shards(mesh, (1, 4, 0, 8), 2, 4), [5, *[4] * (mesh.size() - 2), 3]
    return lambda: x.redistribute(sizes={2: sizes})


def summed(mesh: DeviceMesh) -> Callable[[], Any]:
    x = st.ShardTensor.from_local(torch.randn(4 * mesh.size(), 8), mesh, [Partial()])
    return lambda: x.redistribute(placements=[Shard(0)])


def ring(mesh: DeviceMesh) -> Callable[[], Any]:
    q = shards(mesh, (1, 1, 0, 8), 2, 4)

    def run() -> Any:
        with strategy("ring"):
            return F.scaled_dot_product_attention(q, q, q)

    return run


OPS: dict[str, Callable[[DeviceMesh], Callable[[], Any]]] = {
    "add": lambda mesh: (lambda x: lambda: x + x)(shards(mesh, (0, 8), 0, 4)),
    "conv": conv,
    "conv by 2": conv_strided,
    "conv both ways": conv_both_ways,
    "swap": swap,
    "slice": narrow,
    "roll": roll,
    "from_local": from_local,
    "ring attention": ring,
    "uneven conv": uneven,
    "conv_transpose": on_image(lambda x: F.conv_transpose2d(x, KERNEL, stride=2, padding=1)),
    "max_pool 3 by 2": on_image(lambda x: F.max_pool2d(x, 3, 2, 1)),
    "avg_pool 2": on_image(lambda x: F.avg_pool2d(x, 2)),
    "bilinear": on_image(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "nearest": on_image(lambda x: F.interpolate(x, scale_factor=2)),
    "circular pad": on_image(lambda x: F.pad(x, (0, 0, 1, 1), mode="circular")),
    "zero pad": on_image(lambda x: F.pad(x, (0, 0, 1, 1))),
    "flip": on_image(lambda x: x.flip(2)),
    "repeat": on_image(lambda x: x.repeat(1, 1, 2, 1)),
    "cat": on_image(lambda x: torch.cat([x, x], 2)),
    "diff": on_image(lambda x: x.diff(dim=2)),
    "cumsum": on_image(lambda x: x.cumsum(2)),
    "softmax": on_image(lambda x: x.softmax(2)),
    "unfold": on_image(lambda x: x.unfold(2, 3, 1)),
    "flatten": on_image(lambda x: x.flatten(2)),
    "sum": on_image(lambda x: x.sum(2)),
    "mean": on_image(lambda x: x.mean(2)),
    "select": on_image(lambda x: x[:, :, 3]),
    "chunk": on_image(lambda x: x.chunk(2, 2)),
    "full_tensor": on_image(lambda x: x.full_tensor()),
    "recut": lambda mesh: (
        lambda x, n: lambda: x.redistribute(sizes={2: [5] + [4] * (n - 2) + [3]})
    )(shards(mesh, (1, 4, 0, 8), 2, 4), mesh.size()),
    "reduce_scatter": summed,
    **{name: norm(make, False) for name, make in NORMS.items()},
    **{f"{name}, both": norm(make, True) for name, make in NORMS.items()},
}


def python_calls(run: Callable[[], Any], events: Sequence[str] = ("call", "c_call")) -> int:
    """Functions of Python (call) and of C (c_call) that a call of run makes.

    Not those that the collector calls, which comes in between when others have made enough.
    """
    found = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal found
        found += event in events

    gc.collect()
    gc.disable()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return found


def kernels(run: Callable[[], Any]) -> int:
    """Ops of torch that work on memory, without those that they are made of."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        run()
    events = [e for e in prof.events() if e.name.startswith("aten::")]
    return sum(
        e.name.removeprefix("aten::") not in VIEWS
        and not any(
            c.name.startswith("aten::") and c.name.removeprefix("aten::") not in VIEWS
            for c in e.cpu_children
        )
        for e in events
    )


@contextmanager
def prepared(name: str, ranks: int) -> Iterator[Callable[[], Any]]:
    """One op on the middle rank of so many, not yet called."""
    torch.manual_seed(0)
    cache.clear()
    # models that this thread parallelized before let gradients of leaves wait
    together.forget()
    with silent_world(ranks // 2, ranks):
        try:
            yield OPS[name](init_device_mesh("cpu", (ranks,)))
        finally:
            cache.clear()
            groups.forget()


def first_calls(name: str, ranks: int) -> int:
    """The Python and C functions that the first call calls."""
    with prepared(name, ranks) as run:
        return python_calls(run)


def cost(name: str, ranks: int, repeats: int = REPEATS) -> Cost:
    """What one op takes on one rank of so many."""
    with prepared(name, ranks) as run:
        begin = time.thread_time()
        run()
        cold = time.thread_time() - begin
        times = []
        for _ in range(repeats):
            begin = time.thread_time()
            run()
            times.append(time.thread_time() - begin)
        with st.trace() as t:
            run()
        counts = kernels(run), t.messages, t.bytes, python_calls(run)
    return Cost(1e6 * cold, 1e6 * statistics.median(times), *counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=list(OPS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64, 512, 4096])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread")
    print("op                    ranks    cold us    warm us  kernels  messages     bytes    calls")
    cost("conv", 2, 1)
    for name in options.ops:
        for n in options.ranks:
            c = cost(name, n, options.repeats)
            print(
                f"{name:19} {n:7} {c.cold:10.0f} {c.warm:10.1f} {c.kernels:8} {c.messages:9} "
                f"{c.bytes:9} {c.calls:8}",
                flush=True,
            )


if __name__ == "__main__":
    main()

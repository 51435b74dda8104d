"""Which configuration to run a model in: every sensible one, estimated and ranked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

from torch import nn

from ..observe.network import DGX_H100, Network
from ..shares import balanced
from ..train.options import Options
from .device import CPU
from .estimate import H100, Device, Estimate, Layout, Task, estimate, has_blocks
from .plans import Plans
from .step.collector import quick_collector

_FLAGS = "checkpoint", "offload"
Told = Callable[[int, int, str], None]


def plan(
    make: Callable[[], nn.Module],
    shapes: Sequence[Any] | Mapping[str, Any],
    devices: int,
    device: Device = H100,
    network: Network = DGX_H100,
    *,
    precisions: Sequence[str | None] = (None, "bf16"),
    thorough: bool = False,
    blocks: Sequence[str] = (),
    speeds: Sequence[float] = (),
    multiple: int = 1,
    offload: bool = False,
    told: Told = lambda *_: None,
    **task: Any,
) -> Plans:
    """Every sensible configuration of a model on so many devices, the fastest that fit first.

    make: gives the model. shapes: of its inputs for the whole batch, in a list, or a dict by name
    or that forward takes: `{"x": (1, 4, 721, 1440), "static": (2, 721, 1440)}`, or the only one; a
    tensor has values that the model may read. dims= of the first input may be cut. More:
    `estimate.Task`. Meshes: the batch over the data axis as far as it divides, the rest over the
    dims of the task in every way.
    Each as it is; where it does not fit the device, then with FSDP2 over the data axis or all
    ranks, with checkpointing of blocks, and with both (thorough: all of these anyway). On several
    nodes either the data axis or the dims are within nodes. told: is called before each mesh with
    its number, how many there are and its name. blocks: class names of the units of FSDP2 and of
    checkpointing (default: see `Options`). offload: last, also with what is kept for backward in
    host memory, but for CPUs, whose memory it is. With `tensor=` also a tensor axis of every size
    that divides the devices. speeds: of the devices in the order of the ranks, 1 for `device`
    itself; then each mesh is tried with shards as torch.chunk cuts and as `balance.sizes` does, in
    multiples of `multiple`, and times are those of the rank that takes longest. Those that do not
    fit follow by what they need, then those that are refused. Printed they are a table, in a
    notebook too; `.html(path)` writes a page. Runs in this process, on fake tensors, and sends
    nothing. Raises ValueError for no devices and speeds that are not one above 0 for each,
    RuntimeError where torch.distributed is initialised.
    """
    asked = Task(make, shapes, **task)
    found = ranked(
        asked, devices, device, network, precisions, thorough, blocks, told, speeds, multiple,
        offload,
    )  # fmt: skip
    return Plans(found, asked, devices, device, network, missing(asked, devices))


def fewest(
    make: Callable[[], nn.Module],
    shapes: Sequence[Any] | Mapping[str, Any],
    device: Device = H100,
    network: Network = DGX_H100,
    *,
    most: int = 512,
    precisions: Sequence[str | None] = (None, "bf16"),
    **task: Any,
) -> tuple[int, Estimate] | None:
    """The smallest power of two of devices on which the task fits, and its fastest way; or None."""
    n = 1
    while n <= most:
        found = ranked(Task(make, shapes, **task), n, device, network, precisions, False)
        if found and found[0].fits(device):
            return n, found[0]
        n *= 2
    return None


@quick_collector()
def ranked(
    task: Task,
    devices: int,
    device: Device,
    network: Network,
    precisions: Sequence[str | None],
    thorough: bool,
    names: Sequence[str] = (),
    told: Told = lambda *_: None,
    speeds: Sequence[float] = (),
    multiple: int = 1,
    offload: bool = False,
) -> list[Estimate]:
    """As `plan`."""
    if devices < 1:
        raise ValueError(f"{devices} devices: one or more")
    if speeds and (len(speeds) != devices or min(speeds) <= 0):
        raise ValueError(f"speeds {list(speeds)} of {devices} devices: one above 0 for each")
    found: list[Estimate] = []
    blocks = bool(names) or has_blocks(task)
    offload = offload and device.name != CPU
    bases = list(layouts(task, devices, network.node))
    if speeds:
        bases = [other for base in bases for other in with_speeds(task, base, speeds, multiple)]
    every = list(product(bases, precisions))
    for i, (base, precision) in enumerate(every):
        told(i, len(every), str(base))
        refused: list[set[str]] = []
        for options in _options(task, base, precision, blocks, offload):
            chosen = {
                w
                for w in (options.fsdp, *(k for k in _FLAGS if getattr(options, k)))
                if w is not None
            }
            if any(r <= chosen for r in refused):
                continue
            if chosen:
                options = replace(options, blocks=tuple(names))
            one = estimate(task, replace(base, options=options), device, network)
            found.append(one)
            if one.refused:
                # what is refused with one option may run with the others
                refused.append(chosen)
            elif one.fits(device) and not thorough:
                break
    return sorted(found, key=lambda e: _place(e, device))


def layouts(task: Task, devices: int, node: int = 0) -> Iterator[Layout]:
    """All meshes of the task on so many devices, but for those that cut a dim below one row.

    node: ranks of a node; on several, either the data axis or the dims are within nodes.
    """
    dims = tuple(task.dims)
    # where dim 0 is cut there is no batch
    batch = 1 if 0 in dims else task.shapes[0][0]
    sizes = [task.shapes[0][d] for d in dims]
    shares = [n for n in _divisors(devices) if n == 1 or task.tensor]
    for tensor, data in product(shares, (d for d in _divisors(devices) if batch % d == 0)):
        rest, left = divmod(devices // tensor, data)
        for cuts in () if left else product(_divisors(rest), repeat=len(dims)):
            if prod(cuts) == rest and all(c <= s for c, s in zip(cuts, sizes, strict=True)):
                yield Layout(data, dims, cuts, tensor=tensor)
                if 0 < node < devices and data > 1 and rest > 1:
                    yield Layout(data, dims, cuts, near=True, tensor=tensor)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def with_speeds(
    task: Task, layout: Layout, speeds: Sequence[float], multiple: int = 1
) -> Iterator[Layout]:
    """The layout on ranks of these speeds: as torch.chunk cuts, then by speeds, if that differs.

    Of ranks that hold the same rows of a dim the slowest counts.
    """
    even = replace(layout, speeds=tuple(map(float, speeds)))
    yield even
    found = []
    for d, n in zip(layout.dims, layout.cuts, strict=True):
        slowest = [
            min(s for r, s in enumerate(speeds) if layout.place(r)[f"dim{d}"] == i)
            for i in range(n)
        ]
        found.append(balanced(task.shapes[0][d], n, speeds=slowest, multiple=multiple))
    uneven = replace(even, sizes=tuple(tuple(sizes) for sizes in found))
    if uneven.cut(task.shapes[0]) != even.cut(task.shapes[0]):
        yield uneven


def missing(task: Task, devices: int) -> list[str]:
    """The meshes on so many devices that are no `layouts`, and why, in a line for each reason."""
    found = []
    batch = task.shapes[0][0]
    if 0 in task.dims:
        found.append("a data axis: dim 0 is cut, so there is no batch")
    else:
        parts = [str(d) for d in range(2, devices + 1) if devices % d == 0 and batch % d]
        if parts:
            found.append(f"data {', '.join(parts)}: the batch of {batch} cannot be divided by it")
    for d in task.dims:
        rows = task.shapes[0][d]
        if rows < devices:
            found.append(f"dim{d} above {rows}: it has {rows} rows")
    return found


def _options(
    task: Task, base: Layout, precision: str | None, blocks: bool, offload: bool = False
) -> Iterator[Options]:
    """From the fastest to the one that needs least."""
    yield Options(precision=precision)
    if not task.train:
        return
    # over the data axis no shard is gathered from where samples are cut
    apart = base.ranks // base.tensor
    over = [w for w in ("data", "all") if apart > 1 and (w == "all" or base.data > 1)]
    if base.data == apart:
        over = over[-1:]
    for away, checkpoint in product((False, True)[: 1 + offload], (False, True)[: 1 + blocks]):
        for fsdp in (None, *over) if checkpoint or away else over:
            data = "data" if fsdp == "data" else None
            own = dict[str, Any](checkpoint=checkpoint, offload=away, precision=precision)
            yield Options(fsdp=fsdp, data=data, **own)


def _place(e: Estimate, device: Device) -> tuple[int, float]:
    if e.refused:
        return 2, 0.0
    return (0, e.seconds) if e.fits(device) else (1, float(e.peak))

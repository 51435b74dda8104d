"""What `tiled` would need of a task that does not fit: parts, time, bytes in files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from ..observe.network import DGX_H100, Network
from ..tensor.random import match_single_device
from .apart import Apart, apart
from .device import CPU
from .estimate import Device, Estimate, Layout, Task, estimate
from .step.turns import moved

# arguments and results of an op fit so often into the memory that parts have together
FITS = 3
# parts beyond which nothing is proposed
MOST = 1024
# the device of which it is proposed: `tiled` runs there
# what is there once, whatever the parts
_ONCE = ("parameters", "gradients", "optimizer", "buffers")


@dataclass(frozen=True)
class InParts:
    """A step of a task on one device with `st.tiled(model, parts, dim, memory=memory)`.

    spilled: bytes that are moved to files in a step; most: in files at once. seconds, times: of a
    step, and over that of one device with memory enough; what a disk takes beyond memory's speed
    is not in it. refused: why there is no such step; then all else is 0. halo: rows of the input
    that a part has beside its own, where parts do not meet (`Tiled.halo`), else None.
    """

    parts: int = 0
    dim: int = 0
    memory: int = 0
    spilled: int = 0
    most: int = 0
    seconds: float = 0.0
    times: float = 0.0
    refused: str = ""
    halo: int | None = None

    def __str__(self) -> str:
        if self.refused:
            return f"one device in parts: refused: {self.refused}"
        apart = f", each with {self.halo} rows beside its own" if self.halo is not None else ""
        files = f"{self.most / 2**30:.3g} GiB of files, {self.spilled / 2**30:.3g} GiB written"
        return (
            f"one device in parts: st.tiled(model, {self.parts}, {self.dim}, "
            f"memory={self.memory / 2**30:.3g} * 2**30, spill=...): {self.times:.2f} x the time of "
            f"one that held all{apart}, {files if self.spilled else 'nothing in files'}"
        )


def in_parts(
    task: Task,
    device: Device,
    network: Network = DGX_H100,
    *,
    memory: int = 0,
    parts: Sequence[int] = (),
) -> InParts:
    """The fewest parts in which a step runs on one device, along the dim that needs the least time.

    memory: that parts may hold together; default: what the device has beside weights, gradients,
    optimizer, and one whole input and output. parts: to look at, instead of powers of two. An
    estimate on fake tensors, as `plan`'s, which sends nothing; what is in files follows from what
    ranks hold where they meet, beyond the memory.
    """
    dims = tuple(task.dims)
    # one rank at a time has all of a host
    device = device.among(1)
    whole = estimate(task, Layout(1, dims, (1,) * len(dims)), device, network)
    if whole.refused:
        return InParts(refused=whole.refused)
    once = sum(whole.memory[k] for k in _ONCE)
    # inputs, and outputs of their size
    room = memory or int(device.memory - once - 2 * whole.memory["inputs"])
    if room <= 0:
        return InParts(refused="weights, input and output alone do not fit")
    found = [_along(task, d, room, whole, device, network, parts) for d in dims]
    return min(found, key=lambda f: (bool(f.refused), f.parts, f.seconds))


def _along(
    task: Task,
    dim: int,
    room: int,
    whole: Estimate,
    device: Device,
    network: Network,
    parts: Sequence[int],
) -> InParts:
    rows, n, largest = task.shapes[0][dim], 2, 0
    while FITS * whole.largest > n * room and n < MOST:
        n *= 2
    for count in parts or (n, 2 * n, 4 * n):
        if count > min(rows, MOST):
            return InParts(refused=f"dim {dim} of {rows} rows in {count} parts")
        # as tiled runs it on a CPU: spectra are whole then
        with match_single_device() if device.name == CPU else nullcontext():
            alone = apart(task, dim, count, room, device, network)
            if alone is not None:
                if parts or FITS * alone.largest <= room:
                    return _apart(alone, dim, count, room, whole, task.train)
                largest = alone.largest
                continue
            e = estimate(task, Layout(1, (dim,), (count,)), device, network, turns=True)
        if e.refused:
            return InParts(refused=e.refused)
        if parts or FITS * e.largest <= room:
            return _of(e, dim, count, room, whole, device)
        largest = e.largest
    return InParts(refused=f"an op needs {largest} bytes of {room} in {count} parts")


def _apart(found: Apart, dim: int, parts: int, room: int, whole: Estimate, train: bool) -> InParts:
    # the optimizer steps once
    seconds = found.seconds + (whole.compute - _before(whole) if train else 0.0)
    return InParts(
        parts, dim, room, found.spilled, found.most, seconds,
        seconds / (whole.compute or 1.0), halo=found.halo,
    )  # fmt: skip


def _of(e: Estimate, dim: int, parts: int, room: int, whole: Estimate, device: Device) -> InParts:
    """Of the estimate of one rank."""
    found = moved(e.turns, parts, room)
    nbytes = parts * sum(s.bytes for s in e.sent) + 2 * found.spilled
    copied = 2 * nbytes / device.bandwidth
    # the optimizer steps once
    seconds = parts * _before(e) + (whole.compute - _before(whole)) + copied
    return InParts(
        parts, dim, room, found.spilled, found.most, seconds, seconds / (whole.compute or 1.0)
    )


def _before(e: Estimate) -> float:
    """Seconds of a step without the optimizer's."""
    return dict(e.course.phases).get("optimizer", e.compute) if e.course else e.compute

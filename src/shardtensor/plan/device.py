"""What an op takes on a device: by its datasheet, or by what was measured of its class."""

from __future__ import annotations

import json
import os
import socket
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..observe.network import folder

_CLASSES = {
    "gemm": "mm addmm bmm baddbmm dot mv",
    "conv": "convolution",
    "conv backward": "convolution_backward",
    "norm": "native_layer_norm native_batch_norm native_group_norm _softmax",
    "norm backward": "native_layer_norm_backward native_batch_norm_backward "
    "native_group_norm_backward _softmax_backward_data",
    "fft": "_fft_r2c _fft_c2r _fft_c2c",
    "index": "index index_put index_put_ index_add index_add_ gather scatter scatter_add "
    "index_select embedding embedding_dense_backward",
    "function": "gelu gelu_backward silu silu_backward sigmoid tanh exp log pow erf logaddexp",
    "reduce": "sum mean amax amin var var_mean max_pool2d_with_indices avg_pool2d "
    "max_pool2d_with_indices_backward",
    "copy": "copy_ clone cat _to_copy constant_pad_nd stack index_fill repeat",
    "nothing": "empty new_empty empty_like empty_strided new_empty_strided",
}
_CLASS = {op: name for name, ops in _CLASSES.items() for op in ops.split()}
# where its groups are among a convolution's arguments
_GROUPS = {"convolution": 8, "convolution_backward": 9}


def class_of(func: Any, args: Sequence[Any]) -> str:
    """The class of an op, by which its time is measured: "pointwise" if it is no other."""
    name = func.overloadpacket.__name__
    if "attention" in name:
        return "attention backward" if name.endswith("backward") else "attention"
    found = _CLASS.get(name, "pointwise")
    if found == "gemm":
        return "gemm, complex" if args[0].is_complex() else found
    if name not in _GROUPS:
        return found
    if groups_of(func, args) > 1:
        return f"{found}, groups"
    return f"{found}, 3-D" if args[0].ndim > 4 else found


def groups_of(func: Any, args: Sequence[Any]) -> int:
    """Of a convolution or its backward; 1 of any other op."""
    at = _GROUPS.get(func.overloadpacket.__name__)
    return 1 if at is None or len(args) <= at else int(args[at])


@dataclass(frozen=True)
class Rate:
    """Seconds of an op of a class: by the bytes that it reads and writes, and by its FLOP on top.

    points: (bytes, seconds) that were measured; between them a straight line.
    """

    points: tuple[tuple[float, float], ...]
    flop: float = 0.0

    def seconds(self, flop: float, moved: float) -> float:
        places = [n for n, _ in self.points]
        i = min(max(bisect_left(places, moved), 1), len(places) - 1)
        if i == 0 or moved <= places[0]:
            base = self.points[0][1]
        else:
            (a, s), (b, t) = self.points[i - 1], self.points[i]
            base = s + (moved - a) * (t - s) / (b - a)
        return max(base, self.points[0][1]) + flop * self.flop


@dataclass(frozen=True)
class Rates:
    """What ops take here, with so many ranks at work on this host, each of so many threads.

    classes: by class of op, fp32; launch: what Python and autograd take on top of an op, plain;
    sharded: the same of an op on a ShardTensor.
    """

    host: str
    ranks: int
    threads: int
    classes: dict[str, Rate]
    launch: float
    sharded: float

    def save(self) -> Path:
        """Keep it for `Rates.saved`; returns the file."""
        path = self.file(self.ranks, self.threads)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1))
        return path

    @staticmethod
    def file(ranks: int, threads: int) -> Path:
        return folder() / f"rates-{socket.gethostname()}-cpu-{ranks}-{threads}.json"

    @classmethod
    def saved(cls, ranks: int, threads: int = 0) -> Rates | None:
        """What was measured on this host; None if nothing was."""
        path = cls.file(ranks, threads or torch.get_num_threads())
        if not path.is_file():
            return None
        found = json.loads(path.read_text())
        classes = {
            k: Rate(tuple((n, s) for n, s in r["points"]), r["flop"])
            for k, r in found.pop("classes").items()
        }
        return cls(classes=classes, **found)


@dataclass(frozen=True)
class Device:
    """Memory (bytes), memory bandwidth (bytes/s) and dense FLOP/s by bits of the dtype.

    efficiency: the share of the peak that products reach; launch: the least time of an op (s). Both
    are assumptions, where there are no `rates` that were measured. hides: the share of messages
    that is sent while ops run.
    """

    name: str
    memory: float
    bandwidth: float
    flops: dict[int, float]
    efficiency: float = 0.5
    launch: float = 5e-6
    hides: float = 0.5
    rates: Rates | None = field(default=None, repr=False)

    def seconds(self, flop: float, moved: float, dtype: torch.dtype, kind: str = "") -> float:
        """Of one op: bound by arithmetic, by memory or by its launch."""
        return self.bound(flop, moved, dtype, kind)[1]

    def bound(
        self, flop: float, moved: float, dtype: torch.dtype, kind: str = ""
    ) -> tuple[str, float]:
        """What an op is bound by, and its seconds."""
        if kind == "nothing":
            return "launch", self.launch
        if self.rates is not None:
            return self._measured(flop, moved, dtype, kind)
        bits = min((b for b in self.flops if b >= 8 * dtype.itemsize), default=max(self.flops))
        compute, memory = flop / (self.flops[bits] * self.efficiency), moved / self.bandwidth
        return self._limit(compute, memory), max(compute, memory, self.launch)

    def _measured(
        self, flop: float, moved: float, dtype: torch.dtype, kind: str
    ) -> tuple[str, float]:
        classes = self.rates.classes  # type: ignore[union-attr]
        rate = classes.get(kind) or classes.get(kind.partition(",")[0]) or classes["pointwise"]
        # rates are those of fp32, or of pairs of it
        wide = 8 if dtype.is_complex else 4
        compute = rate.flop * flop * max(1.0, dtype.itemsize / wide)
        memory = rate.seconds(0, moved)
        return self._limit(compute, memory), compute + memory + self.launch

    def _limit(self, compute: float, memory: float) -> str:
        """What takes longest."""
        longest = max(compute, memory, self.launch)
        return "launch" if longest == self.launch else "compute" if longest == compute else "memory"


def measured_here(ranks: int) -> Device:
    """The CPU of this host as `doctor` measured it, with so many ranks at work.

    Raises ValueError where it was not.
    """
    rates = Rates.saved(ranks)
    if rates is None:
        raise ValueError(
            f"nothing was measured here for {ranks} ranks of {torch.get_num_threads()} threads: "
            f"run `shardtensor doctor --ranks {ranks}` with the same OMP_NUM_THREADS"
        )
    return device_of(rates)


def device_of(rates: Rates) -> Device:
    """The part of this host's CPU and memory that one rank has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / rates.ranks
    launch = rates.launch if rates.ranks == 1 else rates.sharded
    speed = {bits: 1.0 / max(rates.classes["gemm"].flop, 1e-15) for bits in (64, 32, 16)}
    (a, s), (b, t) = rates.classes["pointwise"].points[-2:]
    across = (b - a) / max(t - s, 1e-9)
    return Device("cpu", memory, across, speed, 1.0, launch, hides=0.0, rates=rates)


# datasheets, SXM: fp32 without tensor cores, 16 bit dense
A100 = Device("a100", 80e9, 2.0e12, {64: 19.5e12, 32: 19.5e12, 16: 312e12})
H100 = Device("h100", 80e9, 3.35e12, {64: 67e12, 32: 67e12, 16: 989e12})
H200 = Device("h200", 141e9, 4.8e12, {64: 67e12, 32: 67e12, 16: 989e12})
DEVICES = {d.name: d for d in (A100, H100, H200)}

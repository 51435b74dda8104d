"""What an op takes on a device: by its datasheet, or by what was measured of its class."""

from __future__ import annotations

import json
import os
import socket
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..observe.network import folder
from .step.kinds import Work

CPU = "cpu"
# bits of a number in TF32, of which tensor cores make products of fp32
TF32 = 19


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

    classes: by class of op, fp32; launch: what Python and autograd take on top of an op, on a
    ShardTensor where there are several ranks; fresh: of a byte of memory that is new to a process;
    renewed: of columns that are made and given back the share that is new all the same.
    """

    host: str
    ranks: int
    threads: int
    classes: dict[str, Rate]
    launch: float
    fresh: float = 0.0
    renewed: float = 0.0

    def of(self, kind: str) -> Rate:
        """Of a class, or of the one that it is a part of."""
        whole = kind.partition(",")[0]
        return self.classes.get(kind) or self.classes.get(whole) or self.classes["pointwise"]

    def save(self) -> Path:
        """Keep it for `Rates.saved`; returns the file."""
        path = self.file(self.ranks, self.threads)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1))
        return path

    @staticmethod
    def file(ranks: int | str, threads: int) -> Path:
        return folder() / f"rates-{socket.gethostname()}-cpu-{ranks}-{threads}.json"

    @classmethod
    def saved(cls, ranks: int, threads: int = 0) -> Rates | None:
        """What was measured on this host; None if nothing was, or by another version."""
        path = cls.file(ranks, threads or torch.get_num_threads())
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text())
            classes = {
                k: Rate(tuple((n, s) for n, s in r["points"]), r["flop"])
                for k, r in found.pop("classes").items()
            }
            return cls(classes=classes, **found)
        except (KeyError, TypeError, ValueError):
            return None

    @classmethod
    def all_saved(cls) -> dict[int, Rates]:
        """By the number of ranks what was measured here, each of as many threads as now."""
        files = folder().glob(cls.file("*", torch.get_num_threads()).name)
        found = {n: cls.saved(n) for n in sorted(int(f.stem.split("-")[-2]) for f in files)}
        return {n: rates for n, rates in found.items() if rates is not None}


@dataclass(frozen=True)
class Device:
    """Memory (bytes), memory bandwidth (bytes/s) and dense FLOP/s by bits of the dtype.

    Of fp32 there are two, by 32 bits and by those of TF32. efficiency: the share of the peak that
    products reach; launch: the least time of an op (s). Both are assumptions, where there are no
    `rates` that were measured. hides: the share of messages that is sent while ops run. hosted: of
    a host, whose memory its ranks share, what was measured by how many of them were at work. host:
    bytes/s to host memory, and from there.
    """

    name: str
    memory: float
    bandwidth: float
    flops: dict[int, float]
    efficiency: float = 0.5
    launch: float = 5e-6
    hides: float = 0.5
    host: float = 64e9
    rates: Rates | None = field(default=None, repr=False)
    hosted: Mapping[int, Rates] = field(default_factory=dict, repr=False)

    def among(self, ranks: int) -> Device:
        """What each of so many ranks has: a device, or its part of the host's memory and cores.

        Times are those with as many at work, else with the next larger number that was measured.
        """
        if not self.hosted:
            return self
        rates = self.hosted[self._near(ranks)]
        return replace(device_of(rates), memory=self.memory / ranks)

    def _near(self, ranks: int) -> int:
        counts = sorted(self.hosted)
        return next((n for n in counts if n >= ranks), counts[-1])

    def assumes(self, ranks: int) -> str:
        """What `among` takes for granted, of a host; "" of a device."""
        if not self.hosted:
            return ""
        near = self._near(ranks)
        return (
            f"{ranks} ranks on this host share its {self.memory / 2**30:.1f} GiB; times are as "
            f"measured with {near} at work" + (" (more were not)" if near < ranks else "")
        )

    def seconds(self, work: Work) -> float:
        """Of one op: bound by arithmetic, by memory or by its launch."""
        return self.bound(work)[1]

    def bound(self, work: Work) -> tuple[str, float]:
        """What an op is bound by, and its seconds."""
        if work.kind == "host":
            return "memory", max(work.moved / self.host, self.launch)
        if self.rates is not None:
            return self._measured(work, self.rates)
        if work.kind == "nothing":
            # an allocation runs no kernel
            return "launch", 0.0
        wide = _bits(work)
        bits = min((b for b in self.flops if b >= wide), default=max(self.flops))
        compute = work.flop / (self.flops[bits] * self.efficiency)
        memory = work.moved / self.bandwidth
        return self._limit(compute, memory), max(compute, memory, self.launch)

    def _measured(self, work: Work, rates: Rates) -> tuple[str, float]:
        memory = (work.fresh + work.renewed * rates.renewed) * rates.fresh
        if work.kind == "nothing":
            return self._limit(0.0, memory), memory + self.launch
        rate = rates.of(work.kind)
        # rates are those of fp32, or of pairs of it
        wide = 8 if work.dtype.is_complex else 4
        compute = rate.flop * work.flop * max(1.0, work.dtype.itemsize / wide)
        memory += rate.seconds(0, work.moved + work.inside)
        if work.copied:
            memory += rates.of("copy, strided").seconds(0, 2 * work.copied)
        return self._limit(compute, memory), compute + memory + self.launch

    def _limit(self, compute: float, memory: float) -> str:
        """What takes longest."""
        longest = max(compute, memory, self.launch)
        return "launch" if longest == self.launch else "compute" if longest == compute else "memory"


def _bits(work: Work) -> int:
    """Of what products multiply: of fp32 those of TF32, where torch lets kernels round to it."""
    if work.dtype is torch.float32:
        backends: Any = torch.backends
        is_conv = work.kind.startswith("conv")
        if (backends.cudnn.conv if is_conv else backends.cuda.matmul).fp32_precision == "tf32":
            return TF32
    return 8 * work.dtype.itemsize


def measured_here(ranks: int = 0) -> Device:
    """This host as `doctor` measured it, with so many ranks at work or (0) any number of them.

    Raises ValueError where it was not.
    """
    found = Rates.all_saved()
    if not found or (ranks and ranks not in found):
        few = f"{ranks} ranks" if ranks else "ranks"
        raise ValueError(
            f"nothing was measured here for {few} of {torch.get_num_threads()} threads: run "
            f"`shardtensor doctor --ranks {ranks or 2}` with the same OMP_NUM_THREADS"
        )
    rates = found[ranks or min(found)]
    return replace(device_of(rates), memory=_memory(), hosted=found)


def device_of(rates: Rates) -> Device:
    """The part of this host's CPU and memory that one rank has."""
    speed = {bits: 1.0 / max(rates.classes["gemm"].flop, 1e-15) for bits in (64, 32, 16)}
    (a, s), (b, t) = rates.classes["pointwise"].points[-2:]
    across = (b - a) / max(t - s, 1e-9)
    part = _memory() / rates.ranks
    return Device(CPU, part, across, speed, 1.0, rates.launch, hides=0.0, rates=rates)


def _memory() -> float:
    """Of this host, in bytes."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


# datasheets, SXM: fp32 without tensor cores, TF32 and 16 bit dense; PCIe of 16 lanes
A100 = Device("a100", 80e9, 2.0e12, {64: 19.5e12, 32: 19.5e12, TF32: 156e12, 16: 312e12}, host=32e9)
HOPPER = {64: 67e12, 32: 67e12, TF32: 494.5e12, 16: 989e12}
H100 = Device("h100", 80e9, 3.35e12, HOPPER)
H200 = Device("h200", 141e9, 4.8e12, HOPPER)
DEVICES = {d.name: d for d in (A100, H100, H200)}

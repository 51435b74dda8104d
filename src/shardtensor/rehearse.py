"""One rank of N, alone on one device: its compute time, memory and messages.

The transport moves nothing: what arrives from other ranks is made up, so values mean nothing, but
shapes, bytes, messages and the work on this rank are those of the real run. A link model turns the
counted collectives into time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from . import _probe, cache
from .comm import groups
from .comm.count import Sent
from .measure import peak_bytes
from .trace import trace


@dataclass(frozen=True)
class Link:
    """Time of a message between two ranks: latency (s) and bandwidth (bytes/s, each way)."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Network:
    """Links within a node of so many ranks, and between nodes.

    A collective whose group fits into a node takes the inner link, else the outer one.
    """

    inner: Link
    outer: Link
    node: int = 8

    def seconds(self, sent: Sent) -> float:
        """One collective: its rounds' latencies, and its bytes through this rank's link.

        Reductions and gathers go up and down a tree, other messages leave together.
        """
        link = self.inner if sent.ranks <= self.node else self.outer
        rounds = _TRIPS.get(sent.collective, 0) * ceil(log2(max(1, sent.ranks)))
        rounds = min(rounds or 1, sent.messages)
        return rounds * link.latency + sent.bytes / link.bandwidth


# along a tree, up and down or only down
_TRIPS = {"all_reduce": 2, "all_gather": 1, "broadcast": 1}
# datasheets: NVLink 4 (H100, H200) 450 GB/s each way; NDR InfiniBand 400 Gb/s for each GPU.
# Latencies include the launch of a kernel
NVLINK = Link(10e-6, 450e9)
INFINIBAND = Link(20e-6, 50e9)
DGX_H100 = Network(NVLINK, INFINIBAND)


@dataclass(frozen=True)
class Rehearsal:
    """What one rank of a step does.

    seconds: median compute time of the step (s). peak: bytes that it holds at once beyond those
    alive before. sent: its collectives.
    """

    ranks: int
    seconds: float
    peak: int
    sent: tuple[Sent, ...]

    def communication(self, network: Network) -> float:
        """Seconds that all collectives take, one after the other."""
        return sum(network.seconds(s) for s in self.sent)

    def projected(self, network: Network) -> tuple[float, float]:
        """Seconds of the step: (all communication hidden behind computation, none hidden)."""
        wire = self.communication(network)
        return max(self.seconds, wire), self.seconds + wire


def rehearse(
    prepare: Callable[[], Callable[[], Any]],
    ranks: int,
    rank: int = 0,
    *,
    repeats: int = 5,
    device: torch.device | str = "cpu",
) -> Rehearsal:
    """Run step = prepare() as rank `rank` of `ranks`, alone.

    prepare runs where torch.distributed is initialised with `ranks` ranks: it makes the mesh, the
    model and the inputs, with `distribute_tensor(..., src_data_rank=None)` or, so that nothing of
    global size is made, `ShardTensor.from_local(..., sizes=...)`, and returns the step. Raises
    RuntimeError where torch.distributed is already initialised, and UnsupportedOpError where what
    is sent depends on values (sort, masks, indices), which are not known.
    """
    if dist.is_initialized():
        raise RuntimeError("rehearse in a process of its own: torch.distributed is initialised")
    device = torch.device(device)
    cache.clear()
    with _probe.silent_world(rank, ranks):
        try:
            step = prepare()
            with trace() as t:
                step()
            times = []
            for _ in range(repeats):
                _finish(device)
                begin = time.perf_counter()
                step()
                _finish(device)
                times.append(time.perf_counter() - begin)
            peak = peak_bytes(step, device)
        finally:
            cache.clear()
            groups.forget()
    return Rehearsal(ranks, median(times), peak, tuple(t.sent))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""One rank of N, alone on one device: its compute time, memory and messages.

The transport moves nothing: what arrives from other ranks is made up, so values mean nothing, but
shapes, bytes, messages and the work on this rank are those of the real run. A link model turns the
counted collectives into time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from .. import cache
from .._torch import world
from ..comm import groups, together
from ..comm.counters import Sent
from ..observe.network import DGX_H100 as DGX_H100
from ..observe.network import Link as Link
from ..observe.network import Network
from ..observe.trace import trace
from .measure import peak_bytes


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
    together.forget()
    with world.silent_world(rank, ranks):
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
            together.forget()
    return Rehearsal(ranks, median(times), peak, tuple(t.sent))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

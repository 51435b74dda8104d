"""What ran and what was sent, when, and from which line."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .._torch import probe
from ..comm import counters, groups, wire
from ..comm.clock import DeviceClock
from ..page.blocks import heading, text
from ..page.document import Page, Shown
from .timeline import Part, Timeline
from .whole import Watch, Whole, whole


class Trace(Shown):
    """The ops and collectives of this rank inside a `trace()` block.

    A notebook shows it; `.html(path)` writes a page. `gather()` gives that of all ranks.
    """

    begin: float
    end: float
    record: counters.Record

    def __init__(self) -> None:
        me = counters.simulated_rank()
        # one for all open traces of a rank, whose entries are the same
        clock = next((r.clock for r in counters.records if r.rank == me and r.clock), None)
        self.record = counters.Record(me, clock=clock or DeviceClock())
        # (seconds of perf_counter, bytes held beyond those at the start)
        self.memory: list[tuple[float, int]] = []
        self.begin = self.end = time.perf_counter()
        # `trace(model=...)`: the results of all torch functions, plain ones, too
        self.watch: Watch | None = None

    def _stop(self) -> None:
        """Read the marks that the GPU came to: the times of ops and collectives are of it."""
        clock = self.record.clock
        assert clock is not None
        self.end = clock.stop()
        entries: list[counters.Call | counters.Sent] = [*self.calls, *self.sent]
        for item in entries:
            times = None if item.marks is None else item.marks.times()
            if times is not None:
                item.begin, item.end, inside = times
                item.clock = "device"
                if isinstance(item, counters.Sent):
                    item.seconds = inside

    @property
    def ops(self) -> list[tuple[str, str]]:
        """(op, rule) of every call on a ShardTensor, in order."""
        return [(c.op, c.rule) for c in self.record.calls]

    @property
    def calls(self) -> list[counters.Call]:
        """The same with the line of the user and times of begin and end."""
        return self.record.calls

    @property
    def sent(self) -> list[counters.Sent]:
        """Every collective: its name, bytes and messages sent to other ranks, op, line, seconds."""
        return self.record.sent

    @property
    def gathered(self) -> list[tuple[str, int]]:
        """(op, bytes of its operands) of every call that had no rule and gathered them."""
        return self.record.gathered

    @property
    def bytes(self) -> int:
        """Bytes that this rank sent to other ranks."""
        return sum(s.bytes for s in self.sent)

    @property
    def messages(self) -> int:
        """Messages that this rank sent to other ranks."""
        return sum(s.messages for s in self.sent)

    def table(self, by: str = "op") -> str:
        """What was sent, a line for each op and collective, or by="line" for each line of yours.

        Columns: calls, messages, bytes, milliseconds that this rank spent in them, by which clock:
        the host's, or the device's, if it is a GPU, which the host runs ahead of. Longest first.
        """
        if by not in ("op", "line"):
            raise ValueError(f'by is {by!r}; one of "op", "line"')
        rows: dict[tuple[str, str, str, str], list[float]] = {}
        for s in self.sent:
            of = (s.line or "?") if by == "line" else s.op or "-"
            row = rows.setdefault(
                (of, "backward" if s.backward else "", s.collective, s.clock), [0, 0, 0, 0]
            )
            for i, v in enumerate((1, s.messages, s.bytes, 1e3 * s.seconds)):
                row[i] += v
        width = max([12, *(len(of) for of, *_ in rows)])
        lines = [
            f"{by:{width}} {'':8} {'collective':12} {'calls':>6} {'messages':>9} {'bytes':>12} "
            f"{'ms':>9} clock"
        ]
        for (of, way, name, clock), (c, m, b, t) in sorted(rows.items(), key=lambda r: -r[1][3]):
            line = f"{of:{width}} {way:8} {name:12} {c:6.0f} {m:9.0f} {b:12.0f} {t:9.2f} {clock}"
            lines.append(line)
        return "\n".join(lines)

    def whole(self) -> Whole:
        """Which activations every rank computes alike, since where, and what to do.

        Printed, a line for each buffer, parameter or op where that began: the share of activations
        and of time. Raises ValueError unless the trace was given the model.
        """
        if self.watch is None:
            raise ValueError("what ran whole is recorded by st.trace(model=model)")
        return whole(self.watch)

    def part(self, offset: float = 0.0) -> Part:
        """This rank's part of a timeline; offset: of its clock (s)."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        calls = [replace(c, marks=None) for c in self.calls]
        sent = [replace(s, marks=None) for s in self.sent]
        simulated = self.record.rank is not None
        return Part(rank, offset, self.begin, self.end, calls, sent, self.memory, simulated)

    def timeline(self) -> Timeline:
        """Of this rank alone."""
        return Timeline([self.part()])

    def page(self) -> Page:
        """That of its timeline, and what ran whole, where the trace was given the model."""
        page = self.timeline().page()
        if self.gathered:
            nbytes: dict[str, int] = {}
            for op, n in self.gathered:
                nbytes[op] = nbytes.get(op, 0) + n
            told = [f"{op} has no rule: it gathered {n} bytes" for op, n in nbytes.items()]
            page.add(heading("Gathers"), text("\n".join(told)))
        if self.watch is not None:
            page.add(heading("What ran whole"), text(str(self.whole())))
        return page

    def gather(self) -> Timeline:
        """Of all ranks, on every rank: who waited for whom. Communicates: call it on all ranks."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.timeline()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self.part(_clock_offset()))
        return Timeline(parts)

    def save(self, path: str | Path) -> None:
        """Write this rank's timeline as Chrome trace events; see `Timeline.save`."""
        self.timeline().save(path)


@contextmanager
def trace(*, memory: bool = False, model: nn.Module | None = None) -> Iterator[Trace]:
    """Record the ops and collectives of this rank. Outside of it nothing is recorded.

    memory: also what is allocated over time (CPU: by torch's profiler, which slows the program
    down; CUDA: after each op). Raises ValueError for that in a simulated rank, whose process is all
    ranks'. Times of simulated ranks mean little: one runs at a time. What a GPU runs is timed by
    CUDA events, so that nothing waits inside the block; its end waits for the GPU.
    model: also which activations are whole, for `Trace.whole`, by names of its buffers.
    """
    t = Trace()
    t.watch = None if model is None else Watch(model)
    counters.records.append(t.record)
    try:
        with _memory(t) if memory else nullcontext(), t.watch or nullcontext():
            t.begin = time.perf_counter()
            try:
                yield t
            finally:
                t.end = time.perf_counter()
            t._stop()
    finally:
        counters.records.remove(t.record)


@contextmanager
def _memory(t: Trace) -> Iterator[None]:
    if counters.simulated_rank() is not None:
        raise ValueError("memory of a simulated rank: run ranks as processes")
    if torch.cuda.is_initialized():
        start = torch.cuda.memory_allocated()
        after: list[tuple[counters.Call, int]] = []
        t.record.sample = lambda c: after.append((c, torch.cuda.memory_allocated() - start))
        yield
        # when the device got there
        t.memory += [(call.end, held) for call, held in after]
        return
    since = time.perf_counter() - time.time()
    with probe.allocating() as moves:
        yield
    held = 0
    for at, nbytes in moves:
        held += nbytes
        t.memory.append((at + since, held))


def _clock_offset() -> float:
    """How much this rank's clock is ahead of the first rank's; none on one host."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    if len(set(hosts)) == 1:
        return 0.0
    name = groups.world()
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    ahead = []
    for _ in range(9):
        # all leave this about together
        wire.all_gather_numbers([0], device, name)
        now = wire.all_gather_numbers([time.perf_counter_ns()], device, name)
        ahead.append(now[dist.get_rank()][0] - now[0][0])
    return 1e-9 * sorted(ahead)[4]

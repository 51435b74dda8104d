"""Counting what is sent: every collective reports here."""

from __future__ import annotations

import threading
import time
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.profiler import record_function

from .._torch import probe
from .._torch.world import default_group
from ..caller import call_of_user
from .clock import DeviceClock, Marks
from .groups import devices, members, size
from .observers import Hooks, simulated_rank, thread

V = TypeVar("V")


@dataclass(slots=True)
class Sent:
    """One collective of a group of `ranks`. bytes, messages: what this rank sent to others.

    op, rule, line: of the user's call that it belongs to, in backward of the forward call, if that
    was traced. begin, end: of time.perf_counter(), to when its result was there. seconds: that this
    rank spent in it: starting it, and waiting for it. clock: who got there then, the "host" or the
    "device". marks: of the device, read when the trace ends.
    """

    collective: str
    bytes: int
    messages: int
    ranks: int
    op: str
    seconds: float = 0.0
    rule: str = ""
    line: str = ""
    backward: bool = False
    begin: float = 0.0
    end: float = 0.0
    peers: tuple[int, ...] = ()
    clock: str = "host"
    marks: Marks | None = None


@dataclass(slots=True)
class Call:
    """One call of the user on ShardTensors. first, last: autograd's numbers of its nodes.

    clock, marks: as of `Sent`.
    """

    op: str
    rule: str
    line: str
    begin: float
    first: int
    last: int = -1
    end: float = 0.0
    clock: str = "host"
    marks: Marks | None = None


@dataclass(eq=False)
class Record:
    """The calls and collectives of one rank between two points in time."""

    rank: int | None
    sent: list[Sent] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    gathered: list[tuple[str, int]] = field(default_factory=list)
    # called after each call of the user
    sample: Callable[[Call], None] | None = None
    # marks what happens on a GPU
    clock: DeviceClock | None = None

    def origin(self, number: int) -> Call | None:
        """The call that made this node of autograd."""
        at = bisect(self.calls, number, key=lambda c: c.first) - 1
        return self.calls[at] if at >= 0 and number < self.calls[at].last else None


records: list[Record] = []
current_op = threading.local()


def sending(
    start: Callable[[], V], collective: str, nbytes: int, messages: int, group: str, **facts: Any
) -> tuple[V, Sent | None]:
    """start(), which begins a collective, and its entry: for `finish`, if a record notes it.

    Every open record of this rank and who looks on are told. facts: what all ranks of the group
    must agree on, such as dtype and number of elements.
    """
    if default_group() is None:
        raise RuntimeError(
            "the process group was destroyed: make the mesh and its ShardTensors anew"
        )
    # as `looked_at`
    if Hooks.meeting is not None or getattr(thread, "rank", None) is not None:
        meeting(collective, group, facts)
    try:
        if not (records or probe.profiling()):
            return start(), None
        with named(f"shardtensor::send {collective}"):
            return _recorded(start, collective, nbytes, messages, group)
    except RuntimeError as e:
        _explain(e)
        raise


def _recorded(start: Callable[[], V], *what: Any) -> tuple[V, Sent | None]:
    """start() and its entry, which every open record of this rank gets."""
    me = simulated_rank()
    mine = [r for r in records if r.rank == me]
    if not mine:
        return start(), None
    item = _noted(mine[0], *what)
    if "cuda" in devices(what[-1]):
        item.marks = _marks(mine)
    begun = start()
    item.end = time.perf_counter()
    item.seconds = item.end - item.begin
    if item.marks is not None:
        item.marks.add()
    for record in mine:
        record.sent.append(item)
    return begun, item


def _noted(record: Record, collective: str, nbytes: int, messages: int, group: str) -> Sent:
    """The entry of a collective that begins, and to which call it belongs."""
    item = Sent(collective, nbytes, messages, size(group), getattr(current_op, "name", ""))
    call = record.calls[-1] if item.op and record.calls else None
    if not item.op:
        number = probe.backward_nr()
        item.backward = number is not None
        call = None if number is None else record.origin(number)
    if call is not None:
        item.op, item.rule, item.line = item.op or call.op, call.rule, call.line
    else:
        item.line = call_of_user()[0]
    item.peers = members(group)
    item.begin = time.perf_counter()
    return item


def _marks(mine: Iterable[Record]) -> Marks | None:
    """What begins here on a GPU, if one of these records has a clock of it."""
    clock = next((r.clock for r in mine if r.clock is not None), None)
    return None if clock is None else Marks(clock)


def _on_gpu(values: Iterable[Any]) -> bool:
    """Whether a call runs on a GPU: by its first tensor."""
    for value in values:
        first = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(first, torch.Tensor):
            return first.is_cuda
    return False


def named(name: str) -> AbstractContextManager[Any]:
    """A name for what happens inside, where a profiler looks on."""
    return record_function(name) if probe.profiling() else nullcontext()


def meeting(collective: str, group: str, facts: dict[str, Any]) -> None:
    """Tell who looks on that this rank comes to a collective."""
    if simulated_rank() is not None:
        # the simulated world compares what its ranks bring
        thread.facts = {"collective": collective, "facts": facts}
    if Hooks.meeting is not None:
        Hooks.meeting(collective, group, facts)


def _explain(error: RuntimeError) -> None:
    """Raise what ended other ranks, if this error comes of it."""
    found = None if Hooks.explained is None else Hooks.explained(error)
    if found is not None:
        raise found from error


@contextmanager
def explaining() -> Iterator[None]:
    """Around what waits for other ranks: an error comes with what ended them."""
    try:
        yield
    except RuntimeError as e:
        _explain(e)
        raise


def finish(work: Any, item: Sent | None = None) -> None:
    """Wait for a collective that was started; item: what `sending` gave for it."""
    begin = time.perf_counter()
    marks = None if item is None else item.marks
    if marks is not None:
        marks.add()
    if Hooks.explained is None:
        work.wait()
    else:
        with explaining():
            work.wait()
    if item is not None:
        item.end = time.perf_counter()
        item.seconds += item.end - begin
    if marks is not None:
        marks.add()


def called(op: str, args: Any, kwargs: Any = None) -> Any:
    """Tell who looks on of a call of the user whose plain tensors must be the same everywhere."""
    return None if Hooks.calling is None else Hooks.calling(op, args, kwargs)


@contextmanager
def running(
    op: str, rule: str, args: Any = (), kwargs: Any = None, *, device: torch.device | None = None
) -> Iterator[list[Any]]:
    """Note an op in every open record of this rank; collectives inside carry its name.

    Whoever enters puts the op's result into the list. device: where it runs, default: where its
    first tensor is.
    """
    before = getattr(current_op, "name", "")
    seen = error = call = None
    mine: list[Record] = []
    given: list[Any] = []
    if not before:
        seen = called(op, args, kwargs)
        me = simulated_rank()
        mine = [r for r in records if r.rank == me]
        if mine:
            call = Call(op, rule, call_of_user()[0], time.perf_counter(), probe.sequence_nr())
            if _on_gpu(args) if device is None else device.type == "cuda":
                call.marks = _marks(mine)
            for record in mine:
                record.calls.append(call)
    current_op.name = op
    try:
        yield given
    except BaseException as e:
        error = e
        raise
    finally:
        current_op.name = before
        if seen is not None and Hooks.called is not None:
            Hooks.called(seen, args, given, error)
        if call is not None:
            call.end, call.last = time.perf_counter(), probe.sequence_nr()
            if call.marks is not None:
                call.marks.add()
            for record in mine:
                if record.sample is not None:
                    record.sample(call)


def gathering(op: str, nbytes: int) -> None:
    """Note in every open record of this rank that an op without a rule gathers its operands."""
    me = simulated_rank()
    for record in records:
        if record.rank == me:
            record.gathered.append((op, nbytes))

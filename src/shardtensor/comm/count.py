"""Counting what is sent: every collective reports here."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# set in the threads of a simulated world, so that each rank counts its own
thread = threading.local()


@dataclass(slots=True)
class Sent:
    """One collective of a group of `ranks`. bytes, messages: what this rank sent to others."""

    collective: str
    bytes: int
    messages: int
    ranks: int
    op: str
    seconds: float = 0.0


@dataclass(eq=False)
class Record:
    """The collectives of one rank between two points in time."""

    rank: int | None
    sent: list[Sent] = field(default_factory=list)
    ops: list[tuple[str, str]] = field(default_factory=list)
    gathered: list[tuple[str, int]] = field(default_factory=list)


records: list[Record] = []
current_op = threading.local()


def simulated_rank() -> int | None:
    """This thread's rank in a simulated world, None in a process of its own."""
    return getattr(thread, "rank", None)


@contextmanager
def sending(collective: str, nbytes: int, messages: int, ranks: int) -> Iterator[None]:
    """Report a collective to every open record of this rank."""
    if not records:
        yield
        return
    begin = time.perf_counter()
    yield
    me = simulated_rank()
    op, seconds = getattr(current_op, "name", ""), time.perf_counter() - begin
    item = Sent(collective, nbytes, messages, ranks, op, seconds)
    for record in records:
        if record.rank == me:
            record.sent.append(item)


@contextmanager
def running(op: str, rule: str) -> Iterator[None]:
    """Note an op in every open record of this rank; collectives inside carry its name."""
    before = getattr(current_op, "name", "")
    current_op.name = op
    me = simulated_rank()
    for record in records:
        if record.rank == me and not before:
            record.ops.append((op, rule))
    try:
        yield
    finally:
        current_op.name = before


def gathering(op: str, nbytes: int) -> None:
    """Note in every open record of this rank that an op without a rule gathers its operands."""
    me = simulated_rank()
    for record in records:
        if record.rank == me:
            record.gathered.append((op, nbytes))

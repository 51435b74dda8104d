"""Counting what is sent: every collective reports here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

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


class Hooks:
    """What looks on, where something does; see `guard` and `watch`.

    meeting(collective, group, facts) is called before each collective: facts are what the ranks of
    the group (its name, or its ranks) must agree on. calling(op, args, kwargs): before each op of
    the user, while a record is open. explained(error): what an error of a collective means, from
    what other ranks left.
    """

    meeting: Callable[[str, Any, dict[str, Any]], None] | None = None
    calling: Callable[[str, Any, Any], None] | None = None
    explained: Callable[[BaseException], BaseException | None] | None = None


def simulated_rank() -> int | None:
    """This thread's rank in a simulated world, None in a process of its own."""
    return getattr(thread, "rank", None)


@contextmanager
def sending(
    collective: str, nbytes: int, messages: int, ranks: int, group: str, **facts: Any
) -> Iterator[None]:
    """Report a collective to every open record of this rank, and to who looks on.

    facts: what all ranks of the group must agree on, such as dtype and number of elements.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "the process group was destroyed: make the mesh and its ShardTensors anew"
        )
    if Hooks.meeting is not None or simulated_rank() is not None:
        meeting(collective, group, facts)
    with explaining():
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


def meeting(collective: str, group: str, facts: dict[str, Any]) -> None:
    """Tell who looks on that this rank comes to a collective."""
    if simulated_rank() is not None:
        # the simulated world compares what its ranks bring
        thread.facts = {"collective": collective, "facts": facts}
    if Hooks.meeting is not None:
        Hooks.meeting(collective, group, facts)


@contextmanager
def explaining() -> Iterator[None]:
    """Around what waits for other ranks: an error comes with what ended them."""
    try:
        yield
    except RuntimeError as e:
        found = None if Hooks.explained is None else Hooks.explained(e)
        if found is None:
            raise
        raise found from e


def finish(work: Any) -> None:
    """Wait for a collective that was started."""
    if Hooks.explained is None:
        work.wait()
        return
    with explaining():
        work.wait()


def called(op: str, args: Any, kwargs: Any = None) -> None:
    """Tell who looks on of a call of the user whose plain tensors must be the same everywhere."""
    if Hooks.calling is not None:
        Hooks.calling(op, args, kwargs)


@contextmanager
def running(op: str, rule: str, args: Any = (), kwargs: Any = None) -> Iterator[None]:
    """Note an op in every open record of this rank; collectives inside carry its name."""
    before = getattr(current_op, "name", "")
    if not before:
        called(op, args, kwargs)
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

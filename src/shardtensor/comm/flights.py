"""Collectives under way, as the strict transport sees them: their buffers, and that somebody waits.

Of each rank it is known what was started and not waited for yet, and what was dropped before.
"""

from __future__ import annotations

import atexit
import os
import random
import sys
import time
import zlib
from typing import Any
from weakref import WeakSet

import torch

from .. import _torch
from ..errors import TransportError
from .observers import simulated_rank, thread

# of integers that nothing arrived for: no index of anything
_PATTERN = 0x5A
# seconds that a wait takes at most, and how often simulated ranks let others go first
_DELAY, _OFTEN = 2e-3, 0.3


class Flight:
    """A collective under way: its buffers are its own until `wait`."""

    def __init__(self, received: torch.Tensor, send: torch.Tensor, what: str) -> None:
        # nothing is under way before the end
        self.what, self.done, self.mine, self.task = what, True, _mine(), -1
        self.works: list[Any] = []
        self.received = as_bytes(received.data)
        # what arrives does so out of sight
        self.arriving = torch.empty_like(received)
        self.arrived = as_bytes(self.arriving)
        self.arrived.copy_(self.received)
        self.sent = None if send is received else Sent(send)
        poison(received.data)
        self.poison = _checksum(self.received)

    def begun(self, works: list[Any]) -> None:
        """It was started: works are what to wait for."""
        self.works, self.done, self.task = works, False, _torch.graph_task()
        self.mine.begun(self)

    def wait(self) -> None:
        """What was received is there, if nothing touched the buffers meanwhile."""
        if self.done:
            return
        self.done = True
        self.mine.under_way.discard(self)
        delay()
        for work in self.works:
            work.wait()
        with _torch.outside_levels():
            if self.sent is not None and self.sent.changed():
                raise failed(f"{self.what}: what is sent was written to before the wait")
            if _checksum(self.received) != self.poison:
                raise failed(f"{self.what}: what is received was written to before the wait")
            self.received.copy_(self.arrived)

    def __del__(self) -> None:
        if not self.done:
            if self.sent is not None:
                self.sent.let_go()
            dropped = self.what, _torch.storage_ref(self.received), self.sent
            self.mine.dropped.append(dropped)
            self.mine.lost.append((self.what, self.task))


class Sent:
    """What is sent, and whether it changed since."""

    def __init__(self, send: torch.Tensor) -> None:
        self.bytes: torch.Tensor | None = as_bytes(send.data)
        self.sum = _checksum(self.bytes)
        # written to and back again may have been read in between; what was copied is read no more
        counted = self.bytes.data_ptr() == send.data_ptr() and not send.is_inference()
        self.source = send if counted else None
        self.version = send._version if counted else 0

    def changed(self) -> bool:
        """Whether it was written to; not of what is gone."""
        found = self.bytes
        if found is None:
            memory = _torch.storage_of(self.memory)
            if memory is None:
                return False
            found = torch.empty(0, dtype=torch.uint8, device=memory.device)
            found.set_(memory, *self.place)
        moved = self.source is not None and self.source._version != self.version
        return moved or _checksum(found) != self.sum

    def let_go(self) -> None:
        """Keep the memory no longer than others do."""
        assert self.bytes is not None
        self.memory = _torch.storage_ref(self.bytes)
        self.place = self.bytes.storage_offset(), self.bytes.shape, self.bytes.stride()
        self.bytes = self.source = None


class Flights:
    """Of one rank: what is under way, and what was dropped without a wait.

    dropped: (what it is, what was received, what is sent), as long as one of them is in use. lost:
    (what it is, the number of the backward that started it or -1), to the end. ended: backwards
    that came to their end; one that an error broke off leaves what it started.
    """

    def __init__(self) -> None:
        self.under_way: WeakSet[Flight] = WeakSet()
        self.dropped: list[tuple[str, Any, Sent | None]] = []
        self.lost: list[tuple[str, int]] = []
        self.ended: dict[int, bool] = {-1: True}

    def begun(self, flight: Flight) -> None:
        """Something was started."""
        self.under_way.add(flight)
        task = flight.task
        if task not in self.ended:
            self.ended[task] = False
            _torch.after_backward(lambda: self.ended.update({task: True}))

    def forgotten(self) -> list[str]:
        """What nobody waited for, once all is done; forgets it."""
        found = [*self.lost, *((f.what, f.task) for f in self.under_way)]
        for flight in list(self.under_way):
            flight.done = True
        self.under_way.clear()
        self.lost.clear()
        return [what for what, task in found if self.ended[task]]


_of_process = Flights()


def _mine() -> Flights:
    """Those of this rank."""
    if simulated_rank() is None:
        return _of_process
    found: Flights | None = thread.__dict__.get("flights")
    if found is None:
        found = thread.flights = Flights()
    return found


def failed(text: str) -> TransportError:
    """The error; what is under way is not waited for because of it."""
    _mine().forgotten()
    return TransportError(text)


def check() -> None:
    """Raise TransportError if a buffer of what was dropped is in use."""
    kept = _mine().dropped
    if not kept:
        return
    forgotten = [what for what, memory, _ in kept if not memory.expired()]
    written = [what for what, _, sent in kept if sent is not None and sent.changed()]
    # what is sent may be written to later
    kept[:] = [x for x in kept if x[2] is not None and not x[2].memory.expired()]
    if forgotten:
        raise failed(f"{forgotten[0]}: never waited for, and what it received is in use")
    if written:
        kept.clear()
        raise failed(f"{written[0]}: never waited for, and what it sends was written to")


def all_waited_for() -> None:
    """Raise TransportError if something was started that nobody waited for, where all is done."""
    check()
    found = _mine().forgotten()
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise failed(f"{found[0]}: nobody waited for it{more}")


def _at_exit() -> None:
    """End this process with status 1 if something was started that nobody waited for."""
    if hasattr(sys, "last_value"):
        # an error has ended it
        return
    try:
        all_waited_for()
    except TransportError as e:
        print(f"shardtensor: {e}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # handlers cannot change the status in another way
        os._exit(1)


def look_at_exit() -> None:
    """Look once more when this process ends, after what others have to do then."""
    atexit.register(_at_exit)


def as_bytes(flat: torch.Tensor) -> torch.Tensor:
    """A vector's bytes, as a view where its elements lie one after the other."""
    flat = flat.resolve_conj().resolve_neg()
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def poison(x: torch.Tensor) -> None:
    """Values that no result can be mistaken for: NaN, of integers a pattern."""
    if x.is_floating_point() or x.is_complex():
        # of all floating-point types, those of 8 bits, too
        as_bytes(x).fill_(0xFF)
    elif x.dtype is torch.bool:
        x.fill_(True)
    else:
        as_bytes(x).fill_(_PATTERN)


def _checksum(flat: torch.Tensor) -> int:
    return zlib.crc32(flat.cpu().numpy().data)


def delay() -> None:
    """Let a collective take its time: others run first, in an order that a seed fixes."""
    dice = _dice()
    pause = thread.__dict__.get("pause")
    if pause is None:
        time.sleep(dice.random() * _DELAY)
    elif dice.random() < _OFTEN:
        pause()


_delays = random.Random(0)


def _dice() -> random.Random:
    if simulated_rank() is None:
        return _delays
    found: random.Random = thread.__dict__.setdefault("dice", random.Random(simulated_rank()))
    return found

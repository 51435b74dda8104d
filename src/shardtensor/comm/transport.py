"""The calls of torch.distributed that move bytes: what a collective sends passes here.

Under SHARDTENSOR_TRANSPORT=strict, or `simulate(..., transport="strict")`, they do on any machine
what NCCL does to careless code. What is received is poison until it was waited for, what is sent
must not change until then, a wait takes a while, ranks must start the same collectives of a group
in the same order, and buffers are those that NCCL takes.
"""

from __future__ import annotations

import os
import random
import sys
import time
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from .. import _torch
from .._torch import all_gather_flat
from ..caller import call_of_user, op_of
from ..errors import DivergenceError, TransportError, UnsupportedOpError
from . import groups
from .mismatch import difference, position
from .observers import simulated_rank, thread

# what NCCL adds up, and takes the maximum of
REDUCED = frozenset({
    torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
})  # fmt: skip
REDUCE = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}
# of integers that nothing arrived for: no index of anything
_PATTERN = 0x5A
# seconds that a wait takes at most, and how often simulated ranks let others go first
_DELAY, _OFTEN = 2e-3, 0.3
# post(what is received, what is sent) starts a collective
Post = Callable[[torch.Tensor, torch.Tensor], list[Any]]


def is_strict() -> bool:
    """Whether this rank's transport is the strict one."""
    name = thread.__dict__.get("transport")
    return (of_process() if name is None else name) == "strict"


@cache
def of_process() -> str:
    """The transport of this process, read once."""
    return chosen(None)


def chosen(name: str | None) -> str:
    """The name of a transport: this one, or what SHARDTENSOR_TRANSPORT says."""
    name = name or os.environ.get("SHARDTENSOR_TRANSPORT", "") or "plain"
    if name not in ("plain", "strict"):
        raise ValueError(f'SHARDTENSOR_TRANSPORT={name!r}: "plain" or "strict" is expected')
    return name


# the calls ---------------------------------------------------------------------------------------


def all_to_all(
    received: torch.Tensor,
    send: torch.Tensor,
    gets: list[int],
    gives: list[int],
    group: str,
    label: str,
    *,
    wait: bool = False,
) -> list[Any]:
    """Vectors in parts, one for each rank; gets, gives: their bytes. Returns what to wait for."""
    to = groups.resolve(group)

    def post(into: torch.Tensor, out: torch.Tensor) -> list[Any]:
        work = dist.all_to_all_single(as_bytes(into), as_bytes(out), gets, gives, to, not wait)
        return [] if work is None else [work]

    facts = dict(gives=gives, gets=gets)
    return _start(post, received, send, group, label, facts, wait)


def messages(
    received: torch.Tensor,
    send: torch.Tensor,
    gets: dict[int, int],
    gives: dict[int, int],
    group: str,
    label: str,
) -> list[Any]:
    """The same to and from the ranks that are named, by a message each."""
    to = groups.resolve(group)

    def post(into: torch.Tensor, out: torch.Tensor) -> list[Any]:
        ops = [
            dist.P2POp(call, part, group=to, group_peer=r)
            for call, x, of in ((dist.irecv, into, gets), (dist.isend, out, gives))
            for r, part in zip(of, as_bytes(x).split(list(of.values())), strict=True)
            if part.numel()
        ]
        return dist.batch_isend_irecv(ops) if ops else []

    facts = sparse_facts(gives, gets, group) if is_strict() else {}
    return _start(post, received, send, group, label, facts)


def sparse_facts(gives: dict[int, int], gets: dict[int, int], group: str) -> dict[str, Any]:
    """Of the bytes to and from the ranks that are named: those to and from every rank."""
    every = range(groups.size(group))
    return dict(gives=[gives.get(r, 0) for r in every], gets=[gets.get(r, 0) for r in every])


def all_gather(received: torch.Tensor, send: torch.Tensor, group: str) -> None:
    """Every rank's vector, of which all have as long ones, one after the other."""

    def post(into: torch.Tensor, out: torch.Tensor) -> list[Any]:
        all_gather_flat(as_bytes(into), as_bytes(out), group=groups.resolve(group))
        return []

    _start(post, received, send, group, "all_gather", dict(lengths=[send.numel()]), True)


def all_reduce(flat: torch.Tensor, op: str, group: str) -> list[Any]:
    """Reduce a vector in place. Returns what to wait for."""

    def post(into: torch.Tensor, out: torch.Tensor) -> list[Any]:
        work = dist.all_reduce(into, REDUCE[op], group=groups.resolve(group), async_op=True)
        return [] if work is None else [work]

    facts = dict(lengths=[flat.numel()], by=op)
    return _start(post, flat, flat, group, "all_reduce", facts)


def broadcast(flat: torch.Tensor, group: str, source: int = 0) -> None:
    """A vector's values from one rank of the group to all."""

    def post(into: torch.Tensor, out: torch.Tensor) -> list[Any]:
        dist.broadcast(as_bytes(into), group=groups.resolve(group), group_src=source)
        return []

    facts = dict(lengths=[flat.numel()], source=source)
    _start(post, flat, flat, group, "broadcast", facts, True)


def nothing_arrives(received: torch.Tensor) -> None:
    """Zeros, in a silent world: other values may be slow to compute with, or index nothing."""
    received.zero_()


def as_bytes(flat: torch.Tensor) -> torch.Tensor:
    """A vector's bytes, as a view where its elements lie one after the other."""
    flat = flat.resolve_conj().resolve_neg()
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


# the strict ones ---------------------------------------------------------------------------------


class Flight:
    """A collective under way: its buffers are its own until `wait`."""

    def __init__(self, received: torch.Tensor, send: torch.Tensor, what: str, kept: Any) -> None:
        # nothing is under way before the end
        self.what, self.kept, self.done = what, kept, True
        self.works: list[Any] = []
        self.received = as_bytes(received.data)
        # what arrives does so out of sight
        self.arriving = torch.empty_like(received)
        self.arrived = as_bytes(self.arriving)
        self.arrived.copy_(self.received)
        self.sent = None if send is received else Sent(send)
        poison(received.data)
        self.poison = _checksum(self.received)
        self.done = False

    def wait(self) -> None:
        """What was received is there, if nothing touched the buffers meanwhile."""
        if self.done:
            return
        self.done = True
        delay()
        for work in self.works:
            work.wait()
        if self.sent is not None and self.sent.changed():
            raise TransportError(f"{self.what}: what is sent was written to before the wait")
        if _checksum(self.received) != self.poison:
            raise TransportError(f"{self.what}: what is received was written to before the wait")
        self.received.copy_(self.arrived)

    def __del__(self) -> None:
        if not self.done:
            if self.sent is not None:
                self.sent.let_go()
            self.kept.append((self.what, _torch.storage_ref(self.received), self.sent))


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


def _start(
    post: Post,
    received: torch.Tensor,
    send: torch.Tensor,
    group: str,
    label: str,
    facts: dict[str, Any],
    wait: bool = False,
) -> list[Any]:
    """Post a collective; what to wait for."""
    if _torch.transforming():
        if _torch.followed(send) and (send.is_floating_point() or send.is_complex()):
            raise UnsupportedOpError(
                f"torch.func or forward mode of an op that sends ({label}) in a way of its own: "
                "its derivative would be lost. Take torch.autograd.grad, or gather its operands "
                "(full_tensor())"
            )
        received, send = _torch.unwrapped(received), _torch.unwrapped(send)
    if not is_strict():
        return post(received, send)
    record = _record(label, send, facts)
    what = position(record)
    all_waited_for()
    _check(received, group, what, reduces="by" in facts)
    _check(send, group, what, reduces="by" in facts, parts=received is not send)
    if received.dtype is not send.dtype:
        raise TransportError(f"{what}: what is received is taken for {received.dtype}")
    _same_everywhere(record, group, send.device)
    if wait:
        delay()
        return post(received, send)
    flight = Flight(received, send, what, _kept())
    # what is sent is what was there at the start, whatever is done to it
    sent = flight.arriving
    if flight.sent is not None and flight.sent.bytes is not None:
        sent = flight.sent.bytes.clone()
    flight.works = post(flight.arriving, sent)
    return [flight]


def _record(label: str, send: torch.Tensor, facts: dict[str, Any]) -> dict[str, Any]:
    """What this rank comes to; the line is told, but not compared."""
    op = "backward" if _torch.in_backward() else op_of(sys._getframe(1))
    facts = {"dtype": str(send.dtype), **facts}
    return {"collective": label, "op": op, "at": call_of_user()[0], "facts": facts}


def _check(x: torch.Tensor, group: str, what: str, *, reduces: bool, parts: bool = False) -> None:
    """Raise TransportError for a buffer that NCCL would not take, or take for another.

    parts: what is not contiguous is copied before it is sent.
    """
    devices = groups.devices(group)
    if devices and x.device.type not in devices:
        raise TransportError(f"{what}: a {x.device.type} tensor on a mesh of {'/'.join(devices)}")
    if not (parts or x.is_contiguous()):
        raise TransportError(f"{what}: a buffer of strides {x.stride()}, which is not contiguous")
    if x.data_ptr() % x.element_size():
        raise TransportError(f"{what}: a buffer that is not aligned to its {x.dtype} elements")
    if reduces and x.dtype not in REDUCED:
        raise TransportError(f"{what}: NCCL does not reduce {x.dtype}")


def _same_everywhere(record: dict[str, Any], group: str, device: torch.device) -> None:
    """Raise DivergenceError, on all ranks alike, where they do not start the same collective."""
    if simulated_rank() is not None:
        # the simulated world compares when all have come
        brought = thread.__dict__.get("facts", {})
        facts = {**record["facts"], **brought.get("facts", {})}
        thread.facts = {**record, **brought, "facts": facts}
        return
    to, facts = groups.resolve(group), record["facts"]
    n = groups.size(group)
    alike = {k: v for k, v in facts.items() if k not in ("gives", "gets")}
    mark = zlib.crc32(repr((record["collective"], record["op"], alike)).encode())
    mine = [mark, *facts.get("gives", [0] * n), *facts.get("gets", [0] * n)]
    found = torch.empty(n * len(mine), dtype=torch.int64, device=device)
    all_gather_flat(found, torch.tensor(mine, dtype=torch.int64, device=device), group=to)
    marks, gives, gets = found.view(n, -1).cpu().split([1, n, n], 1)
    if bool((marks == mark).all()) and torch.equal(gives, gets.T):
        return
    records: list[Any] = [None] * n
    dist.all_gather_object(records, record, group=to)
    raise DivergenceError(difference(dict(zip(groups.members(group), records, strict=True))))


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
_dropped: list[tuple[str, Any, Sent | None]] = []


def _dice() -> random.Random:
    if simulated_rank() is None:
        return _delays
    found: random.Random = thread.__dict__.setdefault("dice", random.Random(simulated_rank()))
    return found


def _kept() -> list[tuple[str, Any, Sent | None]]:
    """Collectives of this rank that nobody waited for: what they are, received and sent."""
    if simulated_rank() is None:
        return _dropped
    found: list[tuple[str, Any, Sent | None]] = thread.__dict__.setdefault("kept", [])
    return found


def all_waited_for() -> None:
    """Raise TransportError if a buffer of what was not waited for is in use."""
    kept = _kept()
    if not kept:
        return
    forgotten = [what for what, memory, _ in kept if not memory.expired()]
    written = [what for what, _, sent in kept if sent is not None and sent.changed()]
    # what is sent may be written to later
    kept[:] = [x for x in kept if x[2] is not None and not x[2].memory.expired()]
    if forgotten:
        raise TransportError(f"{forgotten[0]}: never waited for, and what it received is in use")
    if written:
        kept.clear()
        raise TransportError(f"{written[0]}: never waited for, and what it sends was written to")

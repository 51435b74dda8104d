"""The calls of torch.distributed that move bytes: what a collective sends passes here.

Under SHARDTENSOR_TRANSPORT=strict, or `simulate(..., transport="strict")`, they do on any machine
what NCCL does to careless code. What is received is poison until it was waited for, what is sent
must not change until then, a wait takes a while, ranks must start the same collectives of a group
in the same order, and buffers are those that NCCL takes.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from .. import _torch
from .._torch import all_gather_flat
from ..caller import call_of_user, op_of
from ..errors import DivergenceError, UnsupportedOpError
from . import flights, groups
from .flights import as_bytes
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
# bytes of a rank from which on gloo, which copies what it gathers, does it in parts; how many
COPIED, PARTS = 2**21, 8
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
        to, into, out = groups.resolve(group), as_bytes(into), as_bytes(out)
        if len(out) < COPIED or dist.get_backend(to) != "gloo":
            all_gather_flat(into, out, group=to)
            return []
        # gloo receives all ranks' in memory of its own, and copies it from there
        step = -(-len(out) // PARTS)
        rows = into.view(-1, len(out)).split(step, 1)
        for row, part in zip(rows, out.split(step), strict=True):
            dist.all_gather(list(row.unbind()), part, group=to)
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


def nothing_arrives(received: torch.Tensor) -> list[Any]:
    """Zeros, in a silent world: other values may be slow to compute with, or index nothing."""
    received.zero_()
    return []


@contextmanager
def on_host() -> Iterator[None]:
    """Tensors of the host are meant, whatever the mesh's devices are."""
    thread.on_host = True
    try:
        yield
    finally:
        thread.on_host = False


# the strict ones ---------------------------------------------------------------------------------


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
    if _torch.is_zero(send):
        # autograd's zeros, as of the second derivative of `abs`, have no memory that could be sent
        send = send.clone()
    if not is_strict():
        return post(received, send)
    # where a level of torch.func is on, what ops make has no memory
    with _torch.outside_levels():
        return _start_strictly(post, received, send, group, _record(label, send, facts), wait)


def _start_strictly(
    post: Post,
    received: torch.Tensor,
    send: torch.Tensor,
    group: str,
    record: dict[str, Any],
    wait: bool,
) -> list[Any]:
    """Post it when all ranks come to the same; what it sends and receives is looked after."""
    what, reduces = position(record), "by" in record["facts"]
    flights.check()
    _check(received, group, what, reduces=reduces)
    _check(send, group, what, reduces=reduces, parts=received is not send)
    if received.dtype is not send.dtype:
        raise flights.failed(f"{what}: what is received is taken for {received.dtype}")
    _same_everywhere(record, group, send.device)
    if wait:
        flights.delay()
        return post(received, send)
    flight = flights.Flight(received, send, what)
    # what is sent is what was there at the start, whatever is done to it
    sent = flight.arriving
    if flight.sent is not None and flight.sent.bytes is not None:
        sent = flight.sent.bytes.clone()
    flight.begun(post(flight.arriving, sent))
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
    devices = () if thread.__dict__.get("on_host") else groups.devices(group)
    if devices and x.device.type not in devices:
        raise flights.failed(f"{what}: a {x.device.type} tensor on a mesh of {'/'.join(devices)}")
    if not (parts or x.is_contiguous()):
        raise flights.failed(f"{what}: a buffer of strides {x.stride()}, which is not contiguous")
    if x.data_ptr() % x.element_size():
        raise flights.failed(f"{what}: a buffer that is not aligned to its {x.dtype} elements")
    if reduces and x.dtype not in REDUCED:
        raise flights.failed(f"{what}: NCCL does not reduce {x.dtype}")


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


if os.environ.get("SHARDTENSOR_TRANSPORT") == "strict":
    # before others are registered, which run earlier then
    flights.look_at_exit()

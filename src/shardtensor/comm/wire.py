"""Moving bytes over a process group: any dtype, any sizes, on gloo and NCCL alike.

Of an exchange each rank names the ranks that it gives something or gets something from. Among few
ranks it is one all-to-all, among many a message to each that is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
import torch.distributed as dist

from .._torch import all_gather_flat
from .._torch.world import is_silent
from . import groups
from .counters import Sent, finish, sending
from .observers import looked_at, simulated_rank

# CPU: bytes to all others up to which one exchange is faster than gloo's own collectives (measured
# on 2 to 4 ranks: a third to a half of their time up to 256 KiB)
DIRECT = 2**20
# ranks up to which one all-to-all with mostly empty parts is faster than messages by themselves
FEW = 8
# groups whose ranks have met in a collective
_met: WeakSet[dist.ProcessGroup] = WeakSet()
# whether a group is one of a rehearsal
_kinds: WeakKeyDictionary[dist.ProcessGroup, bool] = WeakKeyDictionary()
_REDUCE = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
}
_COMBINE: dict[str, Any] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}


def exchange(
    sends: Mapping[int, Sequence[torch.Tensor]],
    shapes: Mapping[int, Sequence[Sequence[int]]],
    like: torch.Tensor,
    group: str,
    label: str,
    *,
    few: bool = True,
) -> dict[int, list[torch.Tensor]]:
    """Send sends[r] to rank r and return what each rank of `shapes` sent here, in shapes[r].

    Ranks that are not named get and give nothing. few: whether every rank gets something of few
    ranks only; all say the same.
    """
    return start_exchange(sends, shapes, like, group, label, few=few, wait=True)()


def start_exchange(
    sends: Mapping[int, Sequence[torch.Tensor]],
    shapes: Mapping[int, Sequence[Sequence[int]]],
    like: torch.Tensor,
    group: str,
    label: str,
    *,
    few: bool = True,
    wait: bool = False,
    **facts: Any,
) -> Callable[[], dict[int, list[torch.Tensor]]]:
    """`exchange` that may still be under way: calling what it returns gives what arrived.

    facts: what ranks must agree on beside the dtype; default: how much each gives each.
    """
    item = like.element_size()
    # bytes to each rank, and from each, in the order of the ranks
    gives = {r: item * sum([c.numel() for c in sends[r]]) for r in sorted(sends)}
    gets = {r: item * sum([_numel(s) for s in shapes[r]]) for r in sorted(shapes)}
    flat = [c.reshape(-1) for r in gives for c in sends[r]]
    send = flat[0] if len(flat) == 1 else torch.cat(flat) if flat else like.new_empty(0)
    received = like.new_empty(sum(gets.values()) // item)
    given = gives.values()
    with sending(
        label, sum(given), sum([b > 0 for b in given]), groups.size(group), group,
        dtype=like.dtype, **(facts or _sparse_facts(gives, gets, group)),
    ) as entry:  # fmt: skip
        works = _post(received, send, gives, gets, group, few, wait)

    def arrived() -> dict[int, list[torch.Tensor]]:
        _end(works, entry, group, label)
        return _split(received, shapes)

    return arrived


def start_all_to_all(
    received: torch.Tensor,
    send: torch.Tensor,
    gets: list[int],
    gives: list[int],
    group: str,
    label: str,
) -> Callable[[], Any]:
    """A vector in parts, one for every other rank, and what they all give this one, in order.

    gets, gives: the bytes from and to every rank, none of this one. Calling what is returned ends
    it.
    """
    n = len(gives)
    facts = dict(gives=gives, gets=gets)
    nbytes = send.numel() * send.element_size()
    work = None
    with sending(label, nbytes, n - gives.count(0), n, group, dtype=send.dtype, **facts) as entry:
        if _silent(group):
            received.zero_()
        else:
            work = dist.all_to_all_single(
                _as_bytes(received), _as_bytes(send), gets, gives, groups.resolve(group), True
            )
    works = [] if work is None else [work]
    return lambda: _end(works, entry, group, label)


def _end(works: list[Any], entry: Sent | None, group: str, label: str) -> None:
    """Wait for what was started; who looks at a hang reads group and label from this frame."""
    for work in works:
        finish(work, entry)


def _sparse_facts(gives: dict[int, int], gets: dict[int, int], group: str) -> dict[str, Any]:
    if not looked_at():
        return {}
    every = range(groups.size(group))
    return dict(gives=[gives.get(r, 0) for r in every], gets=[gets.get(r, 0) for r in every])


def _post(
    received: torch.Tensor,
    send: torch.Tensor,
    gives: dict[int, int],
    gets: dict[int, int],
    group: str,
    few: bool,
    wait: bool,
) -> list[Any]:
    """Start what brings bytes from and to these ranks; on every rank of the group."""
    if _silent(group):
        # nothing arrives, and what lies in memory may be slow to compute with
        received.zero_()
        return []
    n, to = groups.size(group), groups.resolve(group)
    into, out = _as_bytes(received), _as_bytes(send)
    together = not few or n <= FEW or simulated_rank() is not None
    if together or (into.is_cuda and to not in _met):
        # NCCL connects all ranks in a first collective, which some may have nothing to send in
        _met.add(to)
        work = dist.all_to_all_single(
            into,
            out,
            [gets.get(r, 0) for r in range(n)],
            [gives.get(r, 0) for r in range(n)],
            group=to,
            async_op=not wait,
        )
        return [] if work is None else [work]
    ops, at = [], 0
    for r, nbytes in gets.items():
        if nbytes:
            ops.append(dist.P2POp(dist.irecv, into[at : at + nbytes], group=to, group_peer=r))
            at += nbytes
    at = 0
    for r, nbytes in gives.items():
        if nbytes:
            ops.append(dist.P2POp(dist.isend, out[at : at + nbytes], group=to, group_peer=r))
            at += nbytes
    works = dist.batch_isend_irecv(ops) if ops else []
    if wait:
        for work in works:
            finish(work)
        return []
    return works


def all_gather(
    local: torch.Tensor, shapes: Sequence[Sequence[int]], group: str
) -> list[torch.Tensor]:
    """Every rank's tensor, whose shapes are known, on every rank; padded where they differ."""
    n = len(shapes)
    lengths = [_numel(s) for s in shapes]
    most, flat = max(lengths), local.reshape(-1)
    if direct(flat, most, n):
        return _start_to_all(flat, shapes, group, "all_gather", lengths=lengths)()
    received = all_gather_rows(flat, lengths, most, group)
    rows = zip(received, lengths, shapes, strict=True)
    return [row[:length].view(tuple(s)) for row, length, s in rows]


def all_gather_rows(
    flat: torch.Tensor, lengths: Sequence[int], most: int, group: str
) -> torch.Tensor:
    """Every rank's vector, at most so long, as a row; those of shorter ones end in anything."""
    n = len(lengths)
    if flat.numel() < most:
        flat = torch.cat([flat, flat.new_zeros(most - flat.numel())])
    received = flat.new_empty(n * most)
    item = flat.element_size()
    with sending(
        "all_gather", item * most * (n - 1), n - 1, n, group, dtype=flat.dtype, lengths=lengths
    ):
        if _silent(group):
            received.view(n, most).copy_(flat)
        else:
            all_gather_flat(_as_bytes(received), _as_bytes(flat), group=groups.resolve(group))
    return received.view(n, most)


def all_gather_numbers(
    mine: Sequence[int], device: torch.device | str, group: str
) -> list[list[int]]:
    """Every rank's numbers, of which all have as many, on every rank.

    In a world that is silent or of fake tensors every rank has those of this one.
    """
    found: list[list[int]] = all_gather_table(mine, device, group).tolist()
    return found


def all_gather_table(mine: Sequence[int], device: torch.device | str, group: str) -> Any:
    """`all_gather_numbers` as a numpy array (ranks, numbers)."""
    n = groups.size(group)
    if n == 1 or _silent(group):
        return np.broadcast_to(np.array(mine, dtype=np.int64), (n, len(mine)))
    local = torch.tensor(mine, dtype=torch.int64, device=device)
    if direct(local, len(mine), n):
        rows = torch.stack(all_gather(local, [local.shape] * n, group))
    else:
        rows = all_gather_rows(local, [len(mine)] * n, len(mine), group)
    return rows.cpu().numpy()


def all_reduce(xs: Sequence[torch.Tensor], op: str, group: str) -> list[torch.Tensor]:
    """Elementwise reduction over the ranks, of tensors of one dtype in one message."""
    n = groups.size(group)
    if n == 1:
        return [x.clone() for x in xs]
    if len(xs) > 1:
        total = torch.cat([x.reshape(-1) for x in xs])
    else:
        # no view of another tensor, which torch would not let be written to
        total = xs[0].clone(memory_format=torch.contiguous_format)
    wire = total
    if total.is_complex():
        if op != "sum":
            raise ValueError(f"all_reduce {op} of complex numbers")
        wire = torch.view_as_real(total)
    elif total.dtype is torch.bool:
        # logical or / and: sums of booleans saturate
        op = {"sum": "max", "product": "min"}.get(op, op)
        wire = total.view(torch.uint8)
    lengths = [x.numel() for x in xs]
    start_all_reduce(wire.view(-1), op, group, lengths)()
    if len(xs) == 1:
        return [total]
    parts = total.split(lengths)
    return [p.view(x.shape) for p, x in zip(parts, xs, strict=True)]


def start_all_reduce(
    flat: torch.Tensor, op: str, group: str, lengths: Sequence[int]
) -> Callable[[], Any]:
    """Begin to reduce a vector in place; calling what is returned ends it.

    lengths: of the tensors that the vector is made of, on which ranks must agree.
    """
    n = groups.size(group)
    if direct(flat, flat.numel(), n):
        arrived = _start_to_all(
            flat, [[flat.numel()]] * n, group, "all_reduce", lengths=lengths, by=op
        )

        def combine() -> None:
            # in the order of the ranks, so that all get the same bits
            first, second, *others = arrived()
            total = _COMBINE[op](first, second)
            for other in others:
                _COMBINE[op](total, other, out=total)
            flat.copy_(total)

        return combine
    # a ring all-reduce sends each byte twice but for this rank's own part
    nbytes = 2 * flat.numel() * flat.element_size() * (n - 1) // n
    with sending(
        "all_reduce", nbytes, 2 * (n - 1), n, group, dtype=flat.dtype, lengths=lengths, by=op
    ) as entry:
        work = dist.all_reduce(flat, _REDUCE[op], group=groups.resolve(group), async_op=True)
    return lambda: None if work is None else finish(work, entry)


def addends(flat: torch.Tensor, group: str) -> list[torch.Tensor]:
    """Vectors whose sum is that of every rank's vector, which may be written to.

    They are those of all ranks, in their order, where each rank sends to all others; else one.
    """
    n, lengths = groups.size(group), [flat.numel()]
    if direct(flat, flat.numel(), n):
        return _start_to_all(flat, [lengths] * n, group, "all_reduce", lengths=lengths, by="sum")()
    start_all_reduce(flat, "sum", group, lengths)()
    return [flat]


def direct(x: torch.Tensor, most: int, n: int) -> bool:
    """Whether every rank sends all it has to every other; alike on all ranks."""
    few = n <= 8 and (n - 1) * most * x.element_size() <= DIRECT
    return few and x.device.type == "cpu"


def _start_to_all(
    flat: torch.Tensor, shapes: Sequence[Sequence[int]], group: str, label: str, **facts: Any
) -> Callable[[], list[torch.Tensor]]:
    """Every rank's vector on every rank, in shapes, in one round that may be under way."""
    me = groups.rank(group)
    others = [r for r in range(len(shapes)) if r != me]
    arrived = start_exchange(
        {r: [flat] for r in others}, {r: [shapes[r]] for r in others}, flat, group, label, **facts
    )

    def every() -> list[torch.Tensor]:
        found = arrived()
        own = flat.view(tuple(shapes[me]))
        return [own if r == me else found[r][0] for r in range(len(shapes))]

    return every


def broadcast(flat: torch.Tensor, group: str) -> None:
    """A vector's values from the group's first rank to all."""
    to = groups.resolve(group)
    n = groups.size(group)
    first = groups.rank(group) == 0
    nbytes = flat.numel() * flat.element_size() * (n - 1) if first else 0
    with sending(
        "broadcast", nbytes, (n - 1) * first, n, group, dtype=flat.dtype, lengths=[flat.numel()]
    ):
        dist.broadcast(_as_bytes(flat), group=to, group_src=0)


def _as_bytes(flat: torch.Tensor) -> torch.Tensor:
    """A vector's bytes, as a view where its elements lie one after the other."""
    flat = flat.resolve_conj().resolve_neg()
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _numel(shape: Sequence[int]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n


def _split(
    buffer: torch.Tensor, shapes: Mapping[int, Sequence[Sequence[int]]]
) -> dict[int, list[torch.Tensor]]:
    at, found = 0, {}
    for r in sorted(shapes):
        parts = []
        for s in shapes[r]:
            n = _numel(s)
            parts.append(buffer[at : at + n].view(tuple(s)))
            at += n
        found[r] = parts
    return found


def _silent(group: str) -> bool:
    to = groups.resolve(group)
    if to not in _kinds:
        _kinds[to] = is_silent(to)
    return _kinds[to]

"""Moving bytes over a process group: any dtype, any sizes, on gloo and NCCL alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .._torch import all_gather_flat
from .._torch.world import is_silent
from . import groups
from .counters import finish, sending

# CPU: bytes to all others up to which one exchange is faster than gloo's own collectives (measured
# on 2 to 4 ranks: a third to a half of their time up to 256 KiB)
DIRECT = 2**20
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
    chunks: Sequence[Sequence[torch.Tensor]],
    shapes: Sequence[Sequence[Sequence[int]]],
    like: torch.Tensor,
    group: str,
    label: str,
) -> list[list[torch.Tensor]]:
    """Send chunks[r] to rank r and return what each rank sent here, in shapes[r].

    One uneven all-to-all of raw bytes; zero-length to ranks that get nothing.
    """
    return start_exchange(chunks, shapes, like, group, label, wait=True)()


def start_exchange(
    chunks: Sequence[Sequence[torch.Tensor]],
    shapes: Sequence[Sequence[Sequence[int]]],
    like: torch.Tensor,
    group: str,
    label: str,
    *,
    wait: bool = False,
    **facts: Any,
) -> Callable[[], list[list[torch.Tensor]]]:
    """`exchange` that may still be under way: calling what it returns gives what arrived.

    facts: what ranks must agree on beside the dtype; default: how much each gives each.
    """
    flat = [c.reshape(-1) for to in chunks for c in to]
    send = torch.cat(flat) if flat else like.new_empty(0)
    item = like.element_size()
    out_splits = [item * sum(_numel(s) for s in of) for of in shapes]
    in_splits = [item * sum(c.numel() for c in to) for to in chunks]
    received = like.new_empty(sum(out_splits) // item)
    to_group = groups.resolve(group)
    messages = sum(n > 0 for n in in_splits)
    with sending(
        label, sum(in_splits), messages, len(shapes), group,
        dtype=like.dtype, **(facts or dict(gives=in_splits, gets=out_splits)),
    ) as entry:  # fmt: skip
        work = None
        if is_silent(to_group):
            # nothing arrives, and what lies in memory may be slow to compute with
            received.zero_()
        else:
            work = dist.all_to_all_single(
                _as_bytes(received),
                _as_bytes(send),
                out_splits,
                in_splits,
                group=to_group,
                async_op=not wait,
            )

    def arrived() -> list[list[torch.Tensor]]:
        if work is not None:
            finish(work, entry)
        return _split(received, shapes)

    return arrived


def all_gather(
    local: torch.Tensor, shapes: Sequence[Sequence[int]], group: str
) -> list[torch.Tensor]:
    """Every rank's tensor, whose shapes are known, on every rank; padded where they differ."""
    n = len(shapes)
    lengths = [_numel(s) for s in shapes]
    most = max(lengths)
    flat = local.reshape(-1)
    if _direct(flat, most, n):
        return _start_to_all(flat, shapes, group, "all_gather", lengths=lengths)()
    if flat.numel() < most:
        flat = torch.cat([flat, flat.new_zeros(most - flat.numel())])
    received = local.new_empty(n * most)
    item = local.element_size()
    with sending(
        "all_gather", item * most * (n - 1), n - 1, n, group, dtype=local.dtype, lengths=lengths
    ):
        all_gather_flat(
            _as_bytes(received),
            _as_bytes(flat),
            group=groups.resolve(group),
        )
    return [received[r * most : r * most + _numel(s)].view(tuple(s)) for r, s in enumerate(shapes)]


def all_gather_numbers(
    mine: Sequence[int], device: torch.device | str, group: str
) -> list[list[int]]:
    """Every rank's numbers, of which all have as many, on every rank.

    In a world that is silent or of fake tensors every rank has those of this one.
    """
    n = groups.size(group)
    if n == 1 or is_silent(groups.resolve(group)):
        return [list(mine)] * n
    local = torch.tensor(mine, device=device)
    return [x.tolist() for x in all_gather(local, [local.shape] * n, group)]


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
    if _direct(flat, flat.numel(), n):
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


def _direct(x: torch.Tensor, most: int, n: int) -> bool:
    """Whether every rank sends all it has to every other; alike on all ranks."""
    few = n <= 8 and (n - 1) * most * x.element_size() <= DIRECT
    return few and x.device.type == "cpu"


def _start_to_all(
    flat: torch.Tensor, shapes: Sequence[Sequence[int]], group: str, label: str, **facts: Any
) -> Callable[[], list[torch.Tensor]]:
    """Every rank's vector on every rank, in shapes, in one round that may be under way."""
    me = groups.rank(group)
    arrived = start_exchange(
        [[] if r == me else [flat] for r in range(len(shapes))],
        [[] if r == me else [s] for r, s in enumerate(shapes)],
        flat, group, label, **facts,
    )  # fmt: skip
    return lambda: [
        flat.view(tuple(shapes[me])) if r == me else parts[0] for r, parts in enumerate(arrived())
    ]


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
    buffer: torch.Tensor, shapes: Sequence[Sequence[Sequence[int]]]
) -> list[list[torch.Tensor]]:
    at, found = 0, []
    for of in shapes:
        parts = []
        for s in of:
            n = _numel(s)
            parts.append(buffer[at : at + n].view(tuple(s)))
            at += n
        found.append(parts)
    return found

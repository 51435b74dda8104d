"""Moving bytes over a process group: any dtype, any sizes, on gloo and NCCL alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from .._torch import all_gather_flat, is_silent
from . import groups
from .count import finish, sending

_REDUCE = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
    "product": dist.ReduceOp.PRODUCT,
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
) -> Callable[[], list[list[torch.Tensor]]]:
    """`exchange` that may still be under way: calling what it returns gives what arrived."""
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
        dtype=like.dtype, gives=in_splits, gets=out_splits,
    ):  # fmt: skip
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
            finish(work)
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
    return [
        received[r * most : r * most + _numel(s)].view(*s) if len(s) else received[r * most]
        for r, s in enumerate(shapes)
    ]


def all_reduce(xs: Sequence[torch.Tensor], op: str, group: str) -> list[torch.Tensor]:
    """Elementwise reduction over the ranks, of tensors of one dtype in one message."""
    n = groups.size(group)
    if n == 1:
        return [x.clone() for x in xs]
    total = torch.cat([x.reshape(-1) for x in xs]) if len(xs) > 1 else xs[0].reshape(-1).clone()
    wire = total
    if total.is_complex():
        if op != "sum":
            raise ValueError(f"all_reduce {op} of complex numbers")
        wire = torch.view_as_real(total)
    elif total.dtype is torch.bool:
        # logical or / and: sums of booleans saturate
        op = {"sum": "max", "product": "min"}.get(op, op)
        wire = total.view(torch.uint8)
    # a ring all-reduce sends each byte twice but for this rank's own part
    nbytes = 2 * wire.numel() * wire.element_size() * (n - 1) // n
    lengths = [x.numel() for x in xs]
    with sending(
        "all_reduce", nbytes, 2 * (n - 1), n, group, dtype=total.dtype, lengths=lengths, by=op
    ):
        dist.all_reduce(wire, _REDUCE[op], group=groups.resolve(group))
    parts = total.split(lengths)
    return [p.view(x.shape) for p, x in zip(parts, xs, strict=True)]


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
            parts.append(buffer[at : at + n].view(*s))
            at += n
        found.append(parts)
    return found

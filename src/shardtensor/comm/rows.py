"""Rows by global index: `take` and `put`, each the other's adjoint, and what they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cuts import cut
from . import groups, wire
from .constants import constant
from .define import define, run
from .pack import numel_but

Ints = Sequence[int]


def spread(rows: Ints, sizes: Ints) -> list[list[int]]:
    """Rows of each of some ranks by the shard they go to, evenly: sums over both are exact."""
    mine, theirs = (cut(tuple(n)).offsets for n in (rows, sizes))
    total = theirs[-1] or 1

    def below(i: int, j: int) -> int:
        return mine[i] * theirs[j] // total

    return [
        [below(i + 1, j + 1) - below(i, j + 1) - below(i + 1, j) + below(i, j)
         for j in range(len(sizes))]
        for i in range(len(rows))
    ]  # fmt: skip


def exchange_rows(x: Tensor, gives: Ints, gets: Ints, group: str, label: str) -> Tensor:
    """What each rank had for this one, gets[r] rows, in the order of the ranks.

    x: gives[r] rows for each rank, in order; this rank's own among them, which travel along, so
    that nothing has to be cut out or put together.
    """
    if len(gives) == 1:
        return x
    received = x.new_empty([sum(gets), *x.shape[1:]])
    size = numel_but(x.shape, 0) * x.element_size()
    to, of = ([n * size for n in ns] for ns in (gives, gets))
    wire.start_all_to_all(received.view(-1), x.reshape(-1), of, to, group, label)()
    return received


def repeated(values: Tensor, lengths: Tensor, size: int) -> Tensor:
    """values.repeat_interleave(lengths), of `size` numbers, with nothing beside the result."""
    found = values.new_zeros(size + 1)
    found.index_add_(0, lengths.cumsum(0) - lengths, values.diff(prepend=values.new_zeros(1)))
    return found.cumsum_(0)[:size]


def requests(index: Tensor, sizes: Ints, group: str) -> tuple[Tensor, list[int], list[int], Tensor]:
    """Sort global indices by owner and tell each owner.

    Returns the order, how many each owner gets, how many each rank asks of this one, and the local
    rows that they ask for, in the order of the ranks.
    """
    groups.check_values(group)
    ends = constant(cut(sizes).offsets, torch.int64, index)
    owner = torch.bucketize(index, ends[1:], right=True)
    order = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner, minlength=len(sizes))
    named = "indices are taken to name rows of all ranks evenly"
    return order, *_told((index - ends[owner])[order], counts, sizes, group, named)


def requests_in_order(
    index: Tensor, sizes: Ints, group: str
) -> tuple[list[int], list[int], Tensor]:
    """`requests` of ascending indices, without their order; index is written to."""
    groups.check_values(group)
    ends = constant(cut(sizes).offsets, index.dtype, index)
    counts = torch.searchsorted(index, ends).diff()
    index -= repeated(ends[:-1], counts, len(index))
    named = "indices are taken to name no row twice, and rows of all ranks evenly"
    return _told(index, counts, sizes, group, named)


def _told(
    wanted: Tensor, counts: Tensor, sizes: Ints, group: str, named: str
) -> tuple[list[int], list[int], Tensor]:
    """Local rows of each owner in turn, counts of them, as `requests` has them told.

    named: what a plan takes where it does not know the indices.
    """
    one = [1] * len(sizes)
    asked = exchange_rows(counts, one, one, group, "take").tolist()
    per_owner = counts.tolist()
    if groups.spreads(group):
        if sum(per_owner) == wanted.numel():
            named = "other ranks are taken to ask for as many rows as this one asks of them"
        groups.spreads(group, named)
        if sum(per_owner) != wanted.numel():
            per_owner = spread([wanted.numel()], sizes)[0]
        asked = per_owner
    return per_owner, asked, exchange_rows(wanted, per_owner, asked, group, "take")


def _take(x: Tensor, index: Tensor, sizes: Ints, group: str) -> Tensor:
    order, counts, asked, rows = requests(index, sizes, group)
    found = exchange_rows(x[rows], asked, counts, group, "take")
    return torch.empty_like(found).index_copy_(0, order, found)


def _put(rows: Tensor, index: Tensor, sizes: Ints, group: str) -> Tensor:
    order, counts, asked, wanted = requests(index, sizes, group)
    came = exchange_rows(rows[order], counts, asked, group, "put")
    out = rows.new_zeros([sizes[groups.rank(group)], *rows.shape[1:]])
    return out.index_add_(0, wanted, came)


def _index_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rest = inputs[2:]


take_op = define(
    "take(Tensor x, Tensor index, int[] sizes, str group) -> Tensor",
    _take,
    lambda x, index, sizes, group: x.new_empty([index.numel(), *x.shape[1:]]),
    _index_setup,
    lambda ctx, g: (run(put_op, g, ctx.saved_tensors[0], *ctx.rest), None, None, None),
)
put_op: Any = define(
    "put(Tensor rows, Tensor index, int[] sizes, str group) -> Tensor",
    _put,
    lambda rows, index, sizes, group: rows.new_empty([sizes[groups.rank(group)], *rows.shape[1:]]),
    _index_setup,
    lambda ctx, g: (run(take_op, g, ctx.saved_tensors[0], *ctx.rest), None, None, None),
)

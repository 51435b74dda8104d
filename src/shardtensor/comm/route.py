"""Rows by global index along a route that is found once: what an index needs of each rank.

`find` asks the owners, in two small exchanges; then `fetch` and `deliver`, which are each other's
adjoint, move every row once, however often the index names it, with sizes that are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch
from . import groups
from .define import define, run
from .pack import numel_but
from .rows import Ints, exchange_rows, requests_in_order

# rows of several numbers travel a part of each row at a time, so that a round's rows are held twice
# and not all: at most so many rounds, of so many bytes of a shard at least
ROUNDS = 8
ROUND = 2**22


class Route(NamedTuple):
    """The way from rows of all ranks to the entries of this rank's index.

    rows (int64): local rows that go to rank 0, 1, ..., gives[r] of them; this rank's own uses among
    them. gets[r]: how many come from rank r. place (int64): for each entry its row among these;
    None: each entry is the next of them. most: the rows of the longest shard.
    """

    rows: Tensor
    gives: tuple[int, ...]
    gets: tuple[int, ...]
    place: Tensor | None
    most: int
    group: str


def find(index: Tensor, sizes: Sequence[int], group: str) -> Route:
    """The route of a vector of global indices (int64, each rank its own) into shards of `sizes`."""
    distinct, place = torch.unique(_torch.unwrapped(index), return_inverse=True)
    if groups.size(group) == 1:
        return Route(distinct, (len(distinct),), (len(distinct),), place, max(sizes), group)
    # in order, hence by owner
    gets, gives, rows = requests_in_order(distinct, sizes, group)
    return Route(rows, tuple(gives), tuple(gets), place, max(sizes), group)


def arrivals(x: Tensor, route: Route) -> Tensor:
    """The distinct rows that the index names, in order, of a tensor sharded along dim 0."""
    return fetch(x, route._replace(place=None))


def fetch(x: Tensor, route: Route) -> Tensor:
    """The rows (E, ...) that the index names, of a tensor sharded along dim 0."""
    return run(_fetch_op, x, *route[:5], len(x), route.group)


def deliver(values: Tensor, route: Route, rows: int) -> Tensor:
    """Zeros of this rank's number of rows, plus every rank's values (E, ...) where they belong."""
    return run(_deliver_op, values, *route[:5], rows, route.group)


def _columns(x: Tensor, most: int) -> Iterator[slice]:
    """Parts of a row's numbers, as many on all ranks, so that a part of a shard is a round's."""
    width = numel_but(x.shape, 0)
    rounds = max(1, min(ROUNDS, width, most * width * x.element_size() // ROUND))
    step = max(1, -(-width // rounds))
    yield from (slice(a, min(a + step, width)) for a in range(0, width, step))


def _moved(x: Tensor, gives: Ints, gets: Ints, group: str, label: str) -> Tensor:
    return x if groups.size(group) == 1 else exchange_rows(x, gives, gets, group, label)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), numel_but(x.shape, 0))


def _fetch(
    x: Tensor, rows: Tensor, gives: Ints, gets: Ints, place: Tensor | None, most: int, size: int,
    group: str,
) -> Tensor:  # fmt: skip
    entries, flat = sum(gets) if place is None else len(place), _rows(x)
    parts = list(_columns(x, most))
    out = flat.new_empty(entries, flat.shape[1]) if len(parts) != 1 else flat
    for part in parts:
        came = _moved(flat[:, part].index_select(0, rows), gives, gets, group, "take")
        if len(parts) == 1:
            out = came if place is None else came.index_select(0, place)
        elif place is None:
            out[:, part] = came
        else:
            torch.index_select(came, 0, place, out=out[:, part])
        # before the next part is made
        del came
    # no view, to which autograd would let nobody write
    return out.view(entries, *x.shape[1:]).data


def _deliver(
    values: Tensor, rows: Tensor, gives: Ints, gets: Ints, place: Tensor | None, most: int,
    size: int, group: str,
) -> Tensor:  # fmt: skip
    flat = _rows(values)
    out = flat.new_zeros(size, flat.shape[1])
    for part in _columns(values, most):
        here = flat[:, part]
        if place is not None:
            here = flat.new_zeros(sum(gets), here.shape[1]).index_add_(0, place, here)
        out[:, part].index_add_(0, rows, _moved(here, gets, gives, group, "put"))
    return out.view(size, *values.shape[1:]).data


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1], inputs[4])
    ctx.rest = inputs[2:4], inputs[5:]


def _arguments(ctx: Any) -> tuple[Any, ...]:
    rows, place = ctx.saved_tensors
    counts, rest = ctx.rest
    return (rows, *counts, place, *rest)


_SCHEMA = "Tensor rows, int[] gives, int[] gets, Tensor? place, int most, int size, str group"
_fetch_op: Any = define(
    f"fetch(Tensor x, {_SCHEMA}) -> Tensor",
    _fetch,
    lambda x, rows, gives, gets, place, *rest: x.new_empty(
        [sum(gets) if place is None else len(place), *x.shape[1:]]
    ),
    _setup,
    lambda ctx, g: (run(_deliver_op, g, *_arguments(ctx)), *[None] * 7),
)
_deliver_op: Any = define(
    f"deliver(Tensor values, {_SCHEMA}) -> Tensor",
    _deliver,
    lambda values, rows, gives, gets, place, most, size, group: values.new_empty(
        [size, *values.shape[1:]]
    ),
    _setup,
    lambda ctx, g: (run(_fetch_op, g, *_arguments(ctx)), *[None] * 7),
)

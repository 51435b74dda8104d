"""Rows by global index along a route that is found once: what an index needs of each rank.

`find` asks the owners, in two small exchanges; then `fetch` and `deliver`, which are each other's
adjoint, move every row once, however often the index names it, with sizes that are known. What is
large travels in parts: of each row some of its numbers, or of rows of few numbers some rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _torch
from . import groups
from .define import define, run
from .pack import numel_but
from .rows import Ints, exchange_rows, repeated, requests_in_order

# what travels is held twice, and so goes in parts: at most so many, of so many bytes of a shard at
# least
ROUNDS = 16
ROUND = 2**22
# entries at least that are copied to places of 8 bytes at a time
_SOME = 2**16
# what a number of 4 bytes does not hold
_LONG = 2**31


class Route(NamedTuple):
    """The way from rows of all ranks to the entries of this rank's index.

    rows (int): local rows that go to rank 0, 1, ..., gives[r] of them; this rank's own uses among
    them. gets[r]: how many come from rank r. place (int): for each entry its row among these; None:
    each entry is the next of them. most: the rows of the longest shard, by which the numbers of a
    row travel in parts. order: of rows in parts the entries in the order in which theirs come, as
    in place; gives and gets are then those of each part in turn, place counts within a part, and
    ends says how many entries have come with each part; (): as many as rows.
    """

    rows: Tensor
    gives: tuple[int, ...]
    gets: tuple[int, ...]
    place: Tensor | None
    most: int
    group: str
    order: Tensor | None = None
    ends: tuple[int, ...] = ()


def parts_of(most: int, width: int, item: int) -> int:
    """In how many parts rows travel whose numbers are too few to: of the longest shard's rows."""
    return 1 if width >= ROUNDS else max(1, min(ROUNDS, most * width * item // ROUND))


def find(index: Tensor, sizes: Sequence[int], group: str, parts: int = 1) -> Route:
    """The route of a vector of global indices (int64, each rank its own) into shards of `sizes`."""
    index = _torch.unwrapped(index)
    if parts > 1:
        return _in_parts(index, sizes, group, parts)
    distinct, place = torch.unique(index, return_inverse=True)
    if groups.size(group) == 1:
        return Route(distinct, (len(distinct),), (len(distinct),), place, max(sizes), group)
    # in order, hence by owner
    gets, gives, rows = requests_in_order(distinct, sizes, group)
    return Route(rows, tuple(gives), tuple(gets), place, max(sizes), group)


def _in_parts(index: Tensor, sizes: Sequence[int], group: str, parts: int) -> Route:
    """`find` of rows that travel in parts: of what a rank gives another, each has its share."""
    distinct, order = _ordered(index, sum(sizes))
    place, new = None, distinct[1:] != distinct[:-1]
    if not bool(new.all()):
        place = torch.zeros_like(order)
        torch.cumsum(new, 0, dtype=place.dtype, out=place[1:])
        distinct = distinct.unique_consecutive()
    got, given, rows = requests_in_order(distinct, sizes, group)
    del distinct, new
    shares = _shares(given, parts), _shares(got, parts)
    gives, gets = (tuple(n.T.ravel().tolist()) for n in shares)
    to, of = (index.new_tensor(n.tolist()) for n in shares)
    rows = rows.index_select(0, turned(to, integers(len(rows)), len(rows)))
    come = turned(of, integers(sum(gets)), sum(gets))
    if place is None:
        return Route(rows, gives, gets, None, 0, group, order.index_select(0, come))
    # entries of each block, which are next to each other; then where rows of a block come
    ends = torch.searchsorted(place, of.flatten().cumsum(0).to(place.dtype)).view(of.shape)
    entries = ends.flatten().diff(prepend=ends.new_zeros(1)).view(of.shape)
    within = _within(come, of.sum(0))
    del come
    at = turned(entries, order.dtype, len(order))
    # one after the other, so that what was before is gone
    place = place.index_select(0, at)
    place = within.index_select(0, place)
    del within
    done = tuple(entries.sum(0).cumsum(0).tolist())
    return Route(rows, gives, gets, place, 0, group, order.index_select(0, at), done)


def _within(come: Tensor, lengths: Tensor) -> Tensor:
    """Of each row its place in the part with which it comes, of parts of such lengths."""
    places = torch.arange(len(come), dtype=come.dtype, device=come.device)
    places -= repeated((lengths.cumsum(0) - lengths).to(come.dtype), lengths, len(come))
    found = torch.empty_like(come)
    some = max(_SOME, -(-len(come) // ROUNDS))
    for at, place in zip(come.split(some), places.split(some), strict=True):
        found.index_copy_(0, at.long(), place)
    return found


def _ordered(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Numbers below size in order, in one dtype on all ranks, and which entries these are."""
    n, dtype = len(index), integers(size)
    if index.device.type != "cpu" or torch.int64 in (dtype, integers(n)):
        found, order = index.to(dtype).sort()
        return found, order.to(integers(n))
    # a number and its entry are one of 8 bytes, in half the time and memory of torch's sort
    both = index << 32
    both += torch.arange(n)
    both.numpy().sort()
    order, found = both.view(torch.int32).view(n, 2).unbind(1)
    return found.clone(), order.clone()


def integers(n: int) -> torch.dtype:
    """The dtype that holds the numbers below n."""
    return torch.int32 if n < _LONG else torch.int64


def _shares(counts: Ints, parts: int) -> Any:
    """A numpy array (ranks, parts): what each part has of each count."""
    return np.diff(np.array(counts)[:, None] * np.arange(parts + 1) // parts)


def turned(lengths: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """Of (a, b) blocks of such lengths, one after the other, where those in order (b, a) lie.

    size: of all of them.
    """
    starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view(lengths.shape)
    after = lengths.t().flatten()
    more = starts.t().flatten() - (after.cumsum(0) - after)
    found = repeated(more.to(dtype), after, size)
    return found.add_(torch.arange(size, dtype=dtype, device=found.device))


def arrivals(x: Tensor, route: Route) -> Tensor:
    """The distinct rows that the index names, in order, of a tensor sharded along dim 0."""
    return fetch(x, route._replace(place=None))


def fetch(x: Tensor, route: Route) -> Tensor:
    """The rows (E, ...) that the index names, of a tensor sharded along dim 0."""
    return run(_fetch_op, x, *route[:5], len(x), *route[5:])


def deliver(values: Tensor, route: Route, rows: int) -> Tensor:
    """Zeros of this rank's number of rows, plus every rank's values (E, ...) where they belong."""
    return run(_deliver_op, values, *route[:5], rows, *route[5:])


def _columns(x: Tensor, most: int) -> Iterator[slice]:
    """Parts of a row's numbers, as many on all ranks, so that a part of a shard is a round's."""
    width = numel_but(x.shape, 0)
    rounds = max(1, min(ROUNDS, width, most * width * x.element_size() // ROUND))
    step = max(1, -(-width // rounds))
    yield from (slice(a, min(a + step, width)) for a in range(0, width, step))


class _Part(NamedTuple):
    """Of rows in parts: this part's rows, what goes and comes, and its entries, few at a time."""

    rows: slice
    gives: Ints
    gets: Ints
    entries: list[slice]


def _parts(gives: Ints, gets: Ints, ends: Ints, group: str) -> Iterator[_Part]:
    n, given, done = groups.size(group), 0, 0
    every = len(gives) // n
    step = max(1, -(-ends[-1] // every) if ends else -(-sum(gets) // ROUNDS))
    for i in range(every):
        to, of = gives[i * n : (i + 1) * n], gets[i * n : (i + 1) * n]
        end = ends[i] if ends else done + sum(of)
        entries = [slice(a, min(a + step, end)) for a in range(done, max(end, done + 1), step)]
        yield _Part(slice(given, given + sum(to)), to, of, entries)
        given, done = given + sum(to), end


def _entries(gets: Ints, place: Tensor | None, order: Tensor | None) -> int:
    """How many entries the index has."""
    given = place if order is None else order
    return sum(gets) if given is None else len(given)


def _moved(x: Tensor, gives: Ints, gets: Ints, group: str, label: str) -> Tensor:
    return x if groups.size(group) == 1 else exchange_rows(x, gives, gets, group, label)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), numel_but(x.shape, 0))


def _fetch(
    x: Tensor, rows: Tensor, gives: Ints, gets: Ints, place: Tensor | None, most: int, size: int,
    group: str, order: Tensor | None, ends: Ints,
) -> Tensor:  # fmt: skip
    entries, flat = _entries(gets, place, order), _rows(x)
    if order is not None:
        out = flat.new_empty(entries, flat.shape[1])
        for part in _parts(gives, gets, ends, group):
            # of which nothing has a name, as it is to go before the next part is made
            _put_in(out, part, place, order, _moved(
                flat.index_select(0, rows[part.rows]), part.gives, part.gets, group, "take"
            ))  # fmt: skip
        return out.view(entries, *x.shape[1:]).data
    parts = list(_columns(x, most))
    out = flat.new_empty(entries, flat.shape[1]) if len(parts) != 1 else flat
    for columns in parts:
        came = _moved(flat[:, columns].index_select(0, rows), gives, gets, group, "take")
        if len(parts) == 1:
            out = came if place is None else came.index_select(0, place)
        elif place is None:
            out[:, columns] = came
        else:
            torch.index_select(came, 0, place, out=out[:, columns])
        # before the next part is made
        del came
    # no view, to which autograd would let nobody write
    return out.view(entries, *x.shape[1:]).data


def _put_in(out: Tensor, part: _Part, place: Tensor | None, order: Tensor, came: Tensor) -> None:
    """The entries of a part, of the rows that came with it."""
    first = part.entries[0].start
    for e in part.entries:
        some = came[e.start - first : e.stop - first]
        if place is not None:
            some = came.index_select(0, place[e])
        out.index_copy_(0, order[e].long(), some)


def _put_together(flat: Tensor, part: _Part, place: Tensor | None, order: Tensor) -> Tensor:
    """Of each row of a part the sum of its entries."""
    if place is None:
        return flat.index_select(0, order[part.entries[0].start : part.entries[-1].stop])
    out = flat.new_zeros(sum(part.gets), flat.shape[1])
    for e in part.entries:
        out.index_add_(0, place[e], flat.index_select(0, order[e]))
    return out


def _deliver(
    values: Tensor, rows: Tensor, gives: Ints, gets: Ints, place: Tensor | None, most: int,
    size: int, group: str, order: Tensor | None, ends: Ints,
) -> Tensor:  # fmt: skip
    flat = _rows(values)
    out = flat.new_zeros(size, flat.shape[1])
    if order is not None:
        for part in _parts(gives, gets, ends, group):
            out.index_add_(0, rows[part.rows], _moved(
                _put_together(flat, part, place, order), part.gets, part.gives, group, "put"
            ))  # fmt: skip
        return out.view(size, *values.shape[1:]).data
    for columns in _columns(values, most):
        here = flat[:, columns]
        if place is not None:
            here = flat.new_zeros(sum(gets), here.shape[1]).index_add_(0, place, here)
        out[:, columns].index_add_(0, rows, _moved(here, gets, gives, group, "put"))
    return out.view(size, *values.shape[1:]).data


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1], inputs[4], inputs[8])
    ctx.rest = inputs[2:4], inputs[5:8], inputs[9]


def _arguments(ctx: Any) -> tuple[Any, ...]:
    rows, place, order = ctx.saved_tensors
    counts, rest, ends = ctx.rest
    return rows, *counts, place, *rest, order, ends


_SCHEMA = (
    "Tensor rows, int[] gives, int[] gets, Tensor? place, int most, int size, str group, "
    "Tensor? order, int[] ends"
)
_fetch_op: Any = define(
    f"fetch(Tensor x, {_SCHEMA}) -> Tensor",
    _fetch,
    lambda x, rows, gives, gets, place, most, size, group, order, ends: x.new_empty(
        [_entries(gets, place, order), *x.shape[1:]]
    ),
    _setup,
    lambda ctx, g: (run(_deliver_op, g, *_arguments(ctx)), *[None] * 9),
)
_deliver_op: Any = define(
    f"deliver(Tensor values, {_SCHEMA}) -> Tensor",
    _deliver,
    lambda values, rows, gives, gets, place, most, size, *rest: values.new_empty(
        [size, *values.shape[1:]]
    ),
    _setup,
    lambda ctx, g: (run(_fetch_op, g, *_arguments(ctx)), *[None] * 9),
)

"""Rows by global index along a route that is found once: what an index needs of each rank.

`find` asks the owners, in two small exchanges; then `fetch` and `deliver`, which are each other's
adjoint, move every row once, however often the index names it, with sizes that are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import groups
from .define import define
from .rows import Ints, exchange_rows, requests


class Route(NamedTuple):
    """The way from rows of all ranks to the entries of this rank's index.

    rows (int64): local rows that go to rank 0, 1, ..., gives[r] of them; this rank's own uses among
    them. gets[r]: how many come from rank r. place (int64): for each entry its row among these.
    """

    rows: Tensor
    gives: tuple[int, ...]
    gets: tuple[int, ...]
    place: Tensor
    group: str


def find(index: Tensor, sizes: Sequence[int], group: str) -> Route:
    """The route of a vector of global indices (int64, each rank its own) into shards of `sizes`."""
    distinct, place = torch.unique(index, return_inverse=True)
    if groups.size(group) == 1:
        return Route(distinct, (len(distinct),), (len(distinct),), place, group)
    # in order, hence by owner
    _, gets, gives, rows = requests(distinct, sizes, group)
    return Route(rows, tuple(gives), tuple(gets), place, group)


def arrivals(x: Tensor, route: Route) -> Tensor:
    """The distinct rows that the index names, in order, of a tensor sharded along dim 0."""
    return _moved(x.index_select(0, route.rows), route, "take")


def fetch(x: Tensor, route: Route) -> Tensor:
    """The rows (E, ...) that the index names, of a tensor sharded along dim 0."""
    return arrivals(x, route).index_select(0, route.place)


def deliver(values: Tensor, route: Route, rows: int) -> Tensor:
    """Zeros of this rank's number of rows, plus every rank's values (E, ...) where they belong."""
    here = values.new_zeros([sum(route.gets), *values.shape[1:]]).index_add(0, route.place, values)
    came = _moved(here, route, "put")
    return values.new_zeros([rows, *values.shape[1:]]).index_add(0, route.rows, came)


def _moved(x: Tensor, route: Route, label: str) -> Tensor:
    if groups.size(route.group) == 1:
        return x
    ends = (route.gives, route.gets) if label == "take" else (route.gets, route.gives)
    return _route_op(x, *ends, label, route.group)


def _route(x: Tensor, gives: Ints, gets: Ints, label: str, group: str) -> Tensor:
    return exchange_rows(x, gives, gets, group, label)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.rest = inputs[1:]


def _adjoint(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    gives, gets, label, group = ctx.rest
    back = "put" if label == "take" else "take"
    return _route_op(g, gets, gives, back, group), None, None, None, None


_route_op: Any = define(
    "route(Tensor x, int[] gives, int[] gets, str label, str group) -> Tensor",
    _route,
    lambda x, gives, gets, label, group: x.new_empty([sum(gets), *x.shape[1:]]),
    _setup,
    _adjoint,
)

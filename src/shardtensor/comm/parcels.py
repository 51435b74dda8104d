"""What an exchange brings and takes, the same for every message of such shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from ..cache import cached
from .exchanges import FILL, Exchange

Rows = tuple[int, int]


class Parcels(NamedTuple):
    """The parts of an exchange.

    gives, gets: bytes to and from the ranks that are named, in order. nbytes, messages: to others.
    length: elements that come; places: (start, stop, shape) of each part of them. few: whether
    every rank gets something of few ranks only.
    """

    gives: dict[int, int]
    gets: dict[int, int]
    nbytes: int
    messages: int
    length: int
    places: tuple[tuple[int, int, tuple[int, ...]], ...]
    few: bool


def parcels(
    numels: Mapping[int, int],
    shapes: Mapping[int, Sequence[Sequence[int]]],
    item: int,
    few: bool = True,
) -> Parcels:
    """Of the elements of `item` bytes for each rank, and the shapes of what each gives."""
    gives, gets, places, at = {}, {}, [], 0
    for r in sorted(numels):
        gives[r] = item * numels[r]
    for r in sorted(shapes):
        begin = at
        for shape in shapes[r]:
            places.append((at, at + prod(shape), tuple(shape)))
            at += prod(shape)
        gets[r] = item * (at - begin)
    given = list(gives.values())
    messages = len(given) - given.count(0)
    return Parcels(gives, gets, sum(given), messages, at, tuple(places), few)


def of_rows(
    sends: Mapping[int, Sequence[int]],
    gets: Mapping[int, Sequence[int]],
    shape: Sequence[int],
    dim: int,
    item: int,
    few: bool = True,
) -> Parcels:
    """Of so many rows along dim, for and from each rank, of tensors that otherwise have a shape."""
    before, after = tuple(shape[:dim]), tuple(shape[dim + 1 :])
    row = prod(before) * prod(after)
    numels = {r: row * sum(of) for r, of in sends.items()}
    shapes = {r: [(*before, n, *after) for n in of] for r, of in gets.items()}
    return parcels(numels, shapes, item, few)


class Moves(NamedTuple):
    """How rows of a tensor along a dim become those of another.

    shape: of the other. sends: the (start, length) of what others get, rank by rank. own: (start
    there, start here, length) of what stays. came, fills: where what comes, in its order, and
    what no rank has lie there. alone: whether what stays is all of it.
    """

    shape: tuple[int, ...]
    parcels: Parcels
    sends: tuple[Rows, ...]
    own: tuple[tuple[int, int, int], ...]
    came: tuple[Rows, ...]
    fills: tuple[Rows, ...] = ()
    alone: bool = False


@cached
def there(plan: Exchange, dim: int, shape: tuple[int, ...], item: int, me: int) -> Moves:
    """From a shard to a window."""
    of = _where(plan)
    sends = {r: [n for _, n in to] for r, to in plan.sends.items()}
    return Moves(
        (*shape[:dim], plan.rows, *shape[dim + 1 :]),
        of_rows(sends, plan.gets, shape, dim, item, plan.few),
        tuple(rows for r in sorted(sends) for rows in plan.sends[r]),
        tuple((row, start, n) for row, start, n in of.get(me, ())),
        tuple((row, n) for r in sorted(plan.gets) for row, _, n in of[r]),
        tuple((row, n) for row, _, n in of.get(FILL, ())),
    )


@cached
def back(plan: Exchange, dim: int, shape: tuple[int, ...], item: int, me: int) -> Moves:
    """From a window to the shard, where its rows are added up."""
    of = _where(plan)
    gets = {r: [n for _, n in to] for r, to in plan.sends.items()}
    rows = plan.sizes[me]
    return Moves(
        (*shape[:dim], rows, *shape[dim + 1 :]),
        of_rows(plan.gets, gets, shape, dim, item, plan.few),
        tuple((row, n) for r in sorted(plan.gets) for row, _, n in of[r]),
        tuple((start, row, n) for row, start, n in of.get(me, ())),
        tuple(rows for r in sorted(gets) for rows in plan.sends[r]),
        # most windows have all of this rank's own rows, once: the sum begins with them
        alone=[n for _, _, n in of.get(me, ())] == [rows],
    )


def _where(plan: Exchange) -> dict[int, list[tuple[int, int, int]]]:
    """By source, the (row of the window, start, length) of its pieces."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    row = 0
    for source, start, length in plan.pieces:
        found.setdefault(source, []).append((row, start, length))
        row += length
    return found

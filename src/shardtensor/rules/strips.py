"""Strips beside a shard that travel, along several dims in turn: what is given, what comes back.

Those of a later dim have at their ends what came along the dims before: the corners. Border rows
are filled, so that strips and shards have the same shape on all ranks that meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .overlap import Route, resized, start

T = TypeVar("T")


def beside(above: Any, below: Any, me: int) -> tuple[int, int, int, int, bool]:
    """The fields of `Rims` of one rank, of the rows before and behind the shards of all."""
    up = max(0, int(below[me - 1])) if me else 0
    down = int(above[me + 1]) if me + 1 < len(above) else 0
    travel = bool((above[1:] > 0).any() or (below[:-1] > 0).any())
    return int(above[me]), int(below[me]), up, down, travel


class Side(NamedTuple):
    """The rows beside the shard along one dim.

    way, back: the strips' exchange, and their gradients'. ends: (rows, whether they are the last)
    for the neighbours, where they get any. above, below: how many are read beyond the shard, of a
    neighbour or of fill. strips: those that come here, each with its `rows` and whether it lies
    `below` the shard; along the dims of sides before they have what lies beside the shard there.
    """

    d: int
    way: Route
    back: Route
    ends: tuple[tuple[int, bool], ...]
    above: int
    below: int
    strips: tuple[Any, ...]

    def around(self, x: Tensor, strips: list[Tensor], fill: float = 0.0) -> Tensor:
        """x between what lies beside it: strips, fill at the border."""
        came = {s.below: strip for s, strip in zip(self.strips, strips, strict=True)}
        before, after = (
            came[i] if i in came else x.new_full(resized(x.shape, self.d, rows), fill)
            for i, rows in ((False, self.above), (True, self.below))
        )
        return torch.cat([before, x, after], self.d)

    def parted(self, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The adjoint: what x and the strips have of a gradient."""
        rows = g.shape[self.d] - self.above - self.below
        before, own, after = g.split([self.above, rows, self.below], self.d)
        return own, [after if s.below else before for s in self.strips]


def ends(up: int, down: int) -> tuple[tuple[int, bool], ...]:
    """Of `Side`: up, down: how many rows the neighbours before and behind are given."""
    return tuple([(rows, i) for rows, i in ((up, False), (down, True)) if rows])


def end(x: Tensor, d: int, rows: int, below: bool) -> Tensor:
    """The first or last rows along a dim."""
    return x.narrow(d, x.shape[d] - rows if below else 0, rows)


def grown(
    x: Tensor, d: int, rows: int, below: bool, sides: Sequence[Side],
    came: Sequence[list[Tensor]], fill: float = 0.0,
) -> Tensor:  # fmt: skip
    """The first or last rows along d, with what came along these sides beside them."""
    part = end(x, d, rows, below)
    for side, strips in zip(sides, came, strict=False):
        part = side.around(part, [end(s, d, rows, below) for s in strips], fill)
    return part


def given(
    x: Tensor, sides: Sequence[Side], came: Sequence[list[Tensor]], fill: float = 0.0
) -> list[Tensor]:
    """The rows for the neighbours along the next side, with what came along those before."""
    side = sides[len(came)]
    return [grown(x, side.d, rows, below, sides, came, fill) for rows, below in side.ends]


def shaped(x: Tensor, sides: Sequence[Side]) -> Tensor:
    """No memory, in the shape of x with what lies beside it along these."""
    shape = list(x.shape)
    for side in sides:
        shape[side.d] += side.above + side.below
    return x.new_empty(1).expand(shape) if sides else x


# of a shard: (dim, how many rows of an end, whether the last, their gradient)
Owed = tuple[int, int, bool, Tensor]


def shared(
    sides: Sequence[Side], ends: Sequence[tuple[int, bool]], backs: Sequence[Tensor],
    outward: Sequence[list[Tensor]],
) -> list[Owed]:  # fmt: skip
    """The gradients of ends along the last of these, as `grown` made them: what the shard has.

    What belongs to strips that came along the sides before is added to what these give back.
    """
    *others, side = sides
    found = []
    for (rows, below), back in zip(ends, backs, strict=True):
        for other, strips in zip(others[::-1], outward[: len(others)][::-1], strict=True):
            back, parts = other.parted(back)
            for whole, part in zip(strips, parts, strict=True):
                end(whole, side.d, rows, below).add_(part)
        found.append((side.d, rows, below, back))
    return found


def sent(
    x: Tensor, sides: Sequence[Side], meanwhile: Callable[[], T], fill: float = 0.0
) -> tuple[T, list[list[Tensor]]]:
    """(what is computed while the last strips travel, the strips that came along each side)."""
    came: list[list[Tensor]] = []
    for side in sides:
        like = shaped(x, sides[: len(came)]) if came else x
        arrive = start(side.way, like, given(x, sides, came, fill))
        if side is not sides[-1]:
            came.append(arrive())
    found = meanwhile()
    if sides:
        came.append(arrive())
    return found, came


def returned(
    x: Tensor, sides: Sequence[Side], outward: Sequence[list[Tensor]], meanwhile: Callable[[], T]
) -> tuple[T, list[Owed]]:
    """(what is computed while the gradients of strips travel back, those that came for x)."""
    owed: list[Owed] = []
    for i in reversed(range(len(sides))):
        arrive = start(sides[i].back, shaped(x, sides[:i]) if i else x, outward[i])
        if i:
            owed += shared(sides[: i + 1], sides[i].ends, arrive(), outward)
    found = meanwhile()
    if sides:
        owed += shared(sides[:1], sides[0].ends, arrive(), outward)
    return found, owed

"""Rows of several tables one after the other, which stay where they are while only read by index.

A layer of a graph puts the features of its targets before those of its sources and reads rows by
global number. The joined table cut anew would send nearly all rows; each rank's parts one after the
other hold the same rows in another order, in which the numbers are told instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import comm
from ...cache import cached
from ...comm.constants import constant
from ...spec import Dim, Spec
from ...tensor import ShardTensor, wrap
from ...tensor.lazy import Lazy, Recipe, lazy, takes_lazy
from ..empty import joined
from ..gather.index_dim import index_select
from ..labels import Known
from ..nodes import note
from ..operands import checked_dim
from ..routes import kept


class Joined(Recipe):
    """Parts that lie alike but in dim d, joined there."""

    name = "cat"

    def __init__(self, locals_: Sequence[Tensor], parts: tuple[Dim, ...], d: int, spec: Spec):
        # a copy, as cat makes: nobody else can write to it
        self.stacked = joined(locals_, d)
        super().__init__(self.stacked.dtype, self.stacked.device)
        self.parts, self.d, self.spec = parts, d, spec
        sizes = tuple(map(sum, zip(*(p.sizes for p in parts), strict=True)))
        self.rows = Dim(spec.dims[d].size, spec.dims[d].axes, sizes)

    @property
    def grad_fn(self) -> Any:
        return self.stacked.grad_fn

    def local(self, x: Lazy, view: bool) -> Tensor:
        """The rows of this rank's interval of the result, from those that have them."""
        group, dim = comm.along(self.spec, self.d), self.spec.dims[self.d]
        own = self.stacked.split([p.sizes[self.spec.index[self.d]] for p in self.parts], self.d)
        pieces, start = [], 0
        for piece, part in zip(own, self.parts, strict=True):
            windows = dim.clipped(start, start + part.size).spans
            pieces.append(comm.window(piece, self.d, part.sizes, windows, group))
            start += part.size
        return joined(pieces, self.d)

    def numbered(self, index: Tensor) -> Tensor:
        """The numbers of rows in the order of the ranks' stacked parts."""
        firsts, shifts = _numbers(self.parts, self.rows)
        n = self.rows.size
        at = index.long()
        found = torch.bucketize(at, constant(tuple(firsts), torch.int64, at), right=True) - 1
        moved = at + constant(tuple(shifts), torch.int64, at)[found.clamp(min=0)]
        # what is out of bounds stays so
        return torch.where((at >= 0) & (at < n), moved, at)


@cached
def _numbers(parts: tuple[Dim, ...], rows: Dim) -> tuple[list[int], list[int]]:
    """(the first row of every shard of every part, how far it is from its place when stacked)."""
    firsts, shifts = [], []
    before = [0] * len(rows.sizes)
    start = 0
    for part in parts:
        for r, n in enumerate(part.sizes):
            if n:
                firsts.append(start)
                shifts.append(rows.offsets[r] + before[r] - start)
            start += n
            before[r] += n
    return firsts, shifts


def stays(parts: Sequence[Tensor], known: Sequence[Known], d: int) -> bool:
    """Whether parts are tables of rows, two of them sharded along d at least."""
    ndim = parts[0].ndim
    sharded = sum(isinstance(k, Spec) and bool(k.dims[d].axes) for k in known)
    return 2 <= ndim <= 3 and d == ndim - 2 and sharded > 1


def join(locals_: Sequence[Tensor], parts: tuple[Dim, ...], d: int, spec: Spec) -> Lazy:
    """The parts joined along d, not yet moved."""
    for part in parts:
        note(spec.mesh, part)
    return lazy(Joined(locals_, parts, d, spec), spec)


@takes_lazy(torch.index_select, Tensor.index_select)
def select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _read(*args, **kwargs)


@takes_lazy(Tensor.__getitem__)
def getitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, index = args
    if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype is not torch.int64:
        return NotImplemented
    return _read(x, 0, index, negative=True)


def _read(input: Any, dim: Any, index: Any, negative: bool = False) -> Any:
    recipe = input._recipe if isinstance(input, Lazy) else None
    whole = isinstance(index, Tensor) and index.ndim == 1 and index.dtype is torch.int64
    if not isinstance(recipe, Joined) or not whole or isinstance(index, Lazy):
        return NotImplemented
    if type(dim) is not int or not -input.ndim <= dim < input.ndim:
        return NotImplemented
    if checked_dim(dim, input.ndim) != recipe.d or (
        isinstance(index, ShardTensor) and index._spec.partial
    ):
        return NotImplemented
    local = index._local if isinstance(index, ShardTensor) else index

    def make() -> Tensor:
        at = torch.where(local < 0, local + recipe.rows.size, local) if negative else local
        return recipe.numbered(at)

    found = kept([local], ("joined", recipe.parts, negative), make)
    x = wrap(recipe.stacked, recipe.spec.replace({recipe.d: recipe.rows}))
    at = wrap(found, index._spec) if isinstance(index, ShardTensor) else found
    return index_select(x, recipe.d, at)

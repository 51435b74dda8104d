"""Ops that slide a kernel along dims: the rows that a rank's outputs read, the stock op, no more.

`sliding(x, {2: Stencil(3)}, op)`. These laws hold:

- Outputs are cut where inputs are, at kernel centres; a rank makes those that start on it.
- A rank runs op on the rows that its outputs read: in dims that are cut they come with what lies
  before the first row and after the last, filled; in whole dims op pads by itself.
- A rank without outputs runs op on rows of fill, enough for one, and drops it: its weights take
  part in the backward.
- In large shards the rows of the last cut dim travel while op computes what needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from ..cache import cached
from ..dispatch.writes import stands_for_view
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import reduced
from .overlap import overlapped, pays
from .windows import Reach, Stencil, fetch, strided, trim

__all__ = ["Stencil", "sliding"]


class Plan(NamedTuple):
    """The output's dims; of every cut dim its stencil and what it reads; padding left to the op."""

    dims: tuple[tuple[int, Dim], ...]
    reaches: tuple[tuple[int, Stencil, Reach], ...]
    left: tuple[int, ...]


@cached
def plan(spec: Spec, stencils: tuple[tuple[int, Stencil], ...]) -> Plan:
    """How stencils lie on a spec."""
    dims, reaches, left = [], [], []
    for d, s in stencils:
        dim = spec.dims[d]
        if dim.axes:
            reach = strided(dim, s)
            reaches.append((d, s, reach))
            dims.append((d, reach.dim))
            left.append(0)
        else:
            dims.append((d, Dim(max(0, s.outputs(dim.size)))))
            left.append(s.before)
    return Plan(tuple(dims), tuple(reaches), tuple(left))


def fetched(x: ShardTensor, reaches: tuple[tuple[int, Stencil, Reach], ...], fill: float) -> Tensor:
    """This rank's rows in all of these dims, one exchange each."""
    local = x._local
    for d, _, reach in reaches:
        local = fetch(local, d, x._spec, reach, fill)
    return local


def sliding(
    input: ShardTensor,
    stencils: Mapping[int, Stencil],
    op: Callable[..., Tensor],
    *,
    fill: float = 0.0,
    view: str = "",
) -> ShardTensor:
    """The result of an op that slides stencils along dims of a tensor; differentiable.

    op(rows) gets a plain tensor and returns one with `outputs` rows in each dim of a stencil; other
    dims that are cut keep their sizes, and further dims may follow. Where a stencil has padding, it
    is op(rows, padding): what op is to add before each dim, 0 where the rows have it already.
    fill: the padding's value. view: torch's name of the op, if it gives a view.
    Sends the halo of each cut dim, in one exchange a dim; nothing where no rank reads another's.
    """
    x = reduced(input)
    spec = x._spec
    known = tuple([(d % len(spec.dims), s) for d, s in stencils.items()])
    dims, reaches, left = plan(spec, known)

    def run(rows: Tensor) -> Tensor:
        return op(rows, left) if padded else op(rows)

    padded = any(s.before for _, s in known)
    if reaches and pays(spec):
        *others, (d, stencil, reach) = reaches
        rows = fetched(x, tuple(others), fill)
        y = overlapped(rows, d, spec, reach, stencil, run, fill)
    else:
        y = run(fetched(x, reaches, fill))
    for d, _, reach in reaches:
        y = trim(y, d, spec, reach)
    if view and reaches:
        if all(reach.inside for _, _, reach in reaches) and any(
            s.stride < s.extent for _, s in known
        ):
            # rows of which only the specs of all ranks could tell that they share memory
            y = y.clone()
        stands_for_view(y, x._local, view)
    new = dict(dims)
    kept = [new.get(i, dim) for i, dim in enumerate(spec.dims)]
    full = [
        dim if dim.axes or i in new else Dim(n)
        for i, (dim, n) in enumerate(zip(kept, y.shape, strict=False))
    ]
    return wrap(y, spec.with_dims([*full, *(Dim(n) for n in y.shape[len(kept) :])]))

"""Ops that slide a kernel along dims: the rows that a rank's outputs read, the stock op, no more.

`sliding(x, {2: Stencil(3)}, op)`. These laws hold:

- Outputs are cut where inputs are, at kernel centres; as many as inputs lie as these.
- A rank runs op on the rows that its outputs read: in dims that are cut they come with what lies
  before the first row and after the last, filled; in whole dims op pads by itself, as much before
  as behind.
- A rank without outputs runs op on rows of fill, enough for one, and drops it: its weights take
  part in the backward.
- In large shards the rows of the last cut dim travel while op computes what needs none of them; of
  the last two no copy of the shard is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _torch
from ..cache import cached
from ..dispatch.writes import stands_for_view
from ..spec import Dim, Spec, whole_dims
from ..tensor import ShardTensor, layout, wrap
from ..tensor.redistribute import reduced
from .overlap import overlapped, pays
from .overlap_twice import overlapped_twice
from .windows import Reach, Stencil, fetch, strided, trim

__all__ = ["Stencil", "sliding"]


# of dims: the stencil, None for a stencil's adjoint, and what it reads
Reads = tuple[tuple[int, Stencil | None, Reach], ...]


class Plan(NamedTuple):
    """How an op that slides lies on a spec.

    dims: the output's. reaches: of every dim in several shards its stencil and what it reads; None
    for a stencil's adjoint, whose rows nothing can be computed of while others travel. left:
    padding left to the op, which adds as much before a dim as behind. uneven: F.pad's argument for
    whole dims with other padding.
    """

    dims: tuple[tuple[int, Dim], ...]
    reaches: Reads
    left: tuple[int, ...]
    uneven: tuple[int, ...] = ()


@cached
def plan(spec: Spec, stencils: tuple[tuple[int, Stencil], ...]) -> Plan:
    """How stencils lie on a spec."""
    dims, reaches, left = [], [], []
    uneven = [0, 0] * len(spec.dims)
    for d, s in stencils:
        dim = spec.dims[d]
        if dim.is_cut:
            reach = strided(dim, s, spec.alone)
            reaches.append((d, s, reach))
            dims.append((d, reach.dim))
            left.append(0)
        else:
            dims.append((d, whole(dim, max(0, s.outputs(dim.size)))))
            alike = s.after is None or s.after == s.before
            left.append(s.before if alike else 0)
            if s.after is not None and not alike:
                last = 2 * (len(spec.dims) - 1 - d)
                uneven[last : last + 2] = s.before, s.after
    return Plan(tuple(dims), tuple(reaches), tuple(left), tuple(uneven) if any(uneven) else ())


def whole(dim: Dim, rows: int) -> Dim:
    """As many rows in place of those of a dim that lies in one shard."""
    return Dim(rows, dim.axes, (rows,) if dim.axes else ())


def fetched(
    local: Tensor, spec: Spec, reaches: Sequence[tuple[int, Any, Reach]], fill: float = 0.0
) -> Tensor:
    """This rank's rows in all of these dims, one exchange each."""
    for d, _, reach in reaches:
        local = fetch(local, d, spec, reach, fill)
    return local


def slide(
    local: Tensor, spec: Spec, plan: Plan, op: Callable[[Tensor], Tensor], fill: float = 0.0
) -> Tensor:
    """op of the rows that this rank's output rows read, in flight where that pays: these rows."""
    run = op
    if plan.uneven:
        run = lambda rows: op(F.pad(rows, plan.uneven, value=fill))  # noqa: E731
    if not plan.reaches:
        return run(local)
    *others, (d, stencil, reach) = plan.reaches
    if stencil is not None and pays(spec):
        e, other, read = others[-1] if others else (d, None, reach)
        if other is None or read.inside or reach.inside:
            rows = fetched(local, spec, others, fill)
            y = overlapped(rows, d, spec, reach, stencil, run, fill)
        else:
            rows = fetched(local, spec, others[:-1], fill)
            both = (e, other, read), (d, stencil, reach)
            y = overlapped_twice(rows, spec, both, run, fill)
    else:
        y = run(fetched(local, spec, plan.reaches, fill))
    for d, _, reach in plan.reaches:
        y = trim(y, d, spec, reach)
    return y


def sliding(
    input: ShardTensor,
    stencils: Mapping[int, Stencil],
    op: Callable[..., Tensor],
    *,
    fill: float = 0.0,
    view: str = "",
    image: bool = False,
) -> ShardTensor:
    """The result of an op that slides stencils along dims of a tensor; differentiable.

    op(rows) gets a plain tensor and returns one with `outputs` rows in each dim of a stencil; other
    dims that are cut keep their sizes, and further dims may follow. Where a stencil has padding, it
    is op(rows, padding): what op is to add before and behind each dim; 0 where the rows have it
    already, in dims that are cut and where it is not the same before and behind.
    fill: the padding's value. view: torch's name of the op, if it gives a view. image: whether it
    keeps the channels of images and volumes last.
    Sends the halo of each cut dim, in one exchange a dim; nothing where no rank reads another's.
    """
    x = reduced(input)
    spec = x._spec
    known = tuple([(d % len(spec.dims), s) for d, s in stencils.items()])
    lies = plan(spec, known)
    _, reaches, left, _ = lies
    padded = any(s.before for _, s in known)
    y = slide(x._local, spec, lies, (lambda rows: op(rows, left)) if padded else op, fill)
    if view and reaches:
        inside = all(reach.inside for _, _, reach in reaches)
        overlap = any(s.stride < s.extent for _, s in known)
        if overlap if inside else _torch.storage(y)._cdata == _torch.storage(x._local)._cdata:
            # rows of which only the specs of all ranks could tell that they share memory; a rank
            # that needs no others' has a copy, as all have
            y = y.clone()
        elif inside and not y.numel():
            # no rows: a view as those of the others are
            d, _, _ = reaches[0]
            y = x._local.narrow(d, 0, 0).view(y.shape)
        stands_for_view(y, x._local, view)
    out = wrap(y, _result(spec, known, y.shape))
    return layout.like_image(out, x) if image else out


@cached
def _result(spec: Spec, stencils: tuple[tuple[int, Stencil], ...], shape: torch.Size) -> Spec:
    """That of a result with such a local shape."""
    new = dict(plan(spec, stencils).dims)
    kept = [new.get(i, dim) for i, dim in enumerate(spec.dims)]
    full = [
        dim if dim.axes or i in new else Dim(n)
        for i, (dim, n) in enumerate(zip(kept, shape, strict=False))
    ]
    return spec.with_dims([*full, *whole_dims(shape[len(kept) :])])

"""Distances of all pairs of rows: local where rows are sharded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..redistribute import fit, reduced
from ..registry import rule
from ..spec import Dim
from ..tensor import ShardTensor, wrap
from .pointwise import align

# torch takes the matrix product for more rows than this
_MANY = 25


@rule("cdist")
def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """x1 (..., P, M), x2 (..., R, M) to (..., P, R).

    The features come to every rank that has rows. Where one mesh axis shards both P and R, the
    operand with fewer rows comes whole.
    """
    a, b = (reduced(x) if isinstance(x, ShardTensor) else x for x in (x1, x2))
    rows, columns = (
        x._spec.dims[-2] if isinstance(x, ShardTensor) else Dim(x.shape[-2]) for x in (a, b)
    )
    spec, wanted = align(*(_batch(x) for x in (a, b)))
    used = {axis for d in spec.dims for axis in d.axes}
    ends = [rows, columns]
    for i in sorted((0, 1), key=lambda i: -ends[i].size):
        if used.isdisjoint(ends[i].axes):
            used |= set(ends[i].axes)
        else:
            ends[i] = Dim(ends[i].size)
    m = Dim(a.shape[-1])
    out = spec.with_dims([*spec.dims, *ends])
    left, right = fit(
        spec.mesh, out.varying, (a, (*wanted[0], ends[0], m)), (b, (*wanted[1], ends[1], m))
    )
    if compute_mode is None:
        compute_mode = 1 if max(rows.size, columns.size) > _MANY else 2
    local = torch._VF.cdist(left, right, p, compute_mode)  # type: ignore[attr-defined]
    return wrap(local, out)


def _batch(x: Tensor) -> Tensor:
    """What has the batch dims of x and is sharded as they are."""
    if not isinstance(x, ShardTensor):
        return x.new_empty(x.shape[:-2])
    spec = x._spec.with_dims(x._spec.dims[:-2])
    return wrap(x._local.new_empty(spec.local_shape), spec)

"""Tensors cut along other dims than they are: where an op needs a dim whole, or loses it."""

from __future__ import annotations

from collections.abc import Sequence

from ..cache import cached
from ..spec import Dim, Spec
from .redistribute import to_dims
from .shard_tensor import ShardTensor

# elements from which on a result is cut rather than whole on every rank
WHOLE = 2**18


def aside(x: ShardTensor, dims: Sequence[int]) -> ShardTensor | None:
    """x with `dims` whole: what sharded them shards its largest other whole dims instead.

    One all-to-all for each sharded one of `dims`; each rank then has 1/N of the data still. None
    where x has too few other dims.
    """
    new = _aside(x._spec, tuple(dims), 2)
    return None if new is None else to_dims(x, new.dims)


def apart(x: ShardTensor, dims: Sequence[int]) -> ShardTensor:
    """x for an op that takes away `dims`, cut along what is left where the result is large.

    Else every rank would hold the result whole, and so all that is made of it. x itself where its
    shards stay, the result is small, or less than half a shard: what each rank makes of its own
    rows is less to send then.
    """
    numel = 1
    for i, d in enumerate(x._spec.dims):
        if i not in dims:
            numel *= d.size
    return to_dims(x, lasting(x._spec, tuple(dims)).dims) if numel >= WHOLE else x


@cached
def lasting(spec: Spec, dims: tuple[int, ...]) -> Spec:
    """Where a tensor goes before an op takes `dims` away, of which the result is large."""
    left = 1
    for i, d in enumerate(spec.dims):
        left *= 1 if i in dims else d.size
    if spec.partial or 2 * left < spec.shard_numel:
        return spec
    return _aside(spec, dims, None) or spec


@cached
def _aside(spec: Spec, dims: tuple[int, ...], least: int | None) -> Spec | None:
    """least: rows that a dim must have to be cut; None: one for each shard."""
    new = list(spec.dims)
    free = [i for i, f in enumerate(new) if i not in dims and not f.axes]
    free.sort(key=lambda i: new[i].size)
    for d in dims:
        dim = new[d]
        if dim.is_cut:
            if not free or new[free[-1]].size < (least or len(dim.sizes)):
                return None
            to = free.pop()
            new[to] = Dim.chunked(new[to].size, dim.axes, spec.mesh)
            new[d] = dim.whole
    return spec.with_dims(new)


def on_dim(x: ShardTensor, d: int) -> ShardTensor:
    """x with all its shards along dim d."""
    axes = x._spec.varying
    if axes == x._spec.dims[d].axes:
        return x
    cut = Dim.chunked(x.shape[d], axes, x._spec.mesh)
    return to_dims(x, x._spec.replicated().replace({d: cut}).dims)

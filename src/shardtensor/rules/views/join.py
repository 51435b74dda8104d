"""Joining, rolling, flipping, repeating: windows where the joined dim is sharded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _torch, comm
from ...cache import cached
from ...comm.formats import memory_format
from ...cuts import Kept
from ...registry import rule
from ...spec import Dim, Spec, whole_dims
from ...tensor import ShardTensor, layout, wrap
from ...tensor.redistribute import fit, local_of, reduced
from .. import labels
from ..empty import joined
from ..labels import Known
from ..operands import checked_dim, many
from ..pointwise import align
from .joined import join, stays


@rule("cat", "concat", "concatenate")
def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Parts one after the other; where dim is sharded, what is sharded already stays in place."""
    parts = list(tensors)
    if any(x.ndim != 1 for x in parts):
        parts = [x for x in parts if x.shape != (0,)]
    skipped = [x for x in tensors if x.shape == (0,)] if len(parts) < len(tensors) else []
    d = checked_dim(dim, parts[0].ndim)
    for x in parts:
        if [*x.shape[:d], *x.shape[d + 1 :]] != [*parts[0].shape[:d], *parts[0].shape[d + 1 :]]:
            raise RuntimeError(
                f"Sizes of tensors must match except in dimension {d}: {list(parts[0].shape)} and "
                f"{list(x.shape)}"
            )
    parts = [reduced(x) for x in parts]
    known = tuple(map(labels.known, parts))
    if not any(isinstance(k, Spec) for k in known):
        return _with_gradients(torch.cat(parts, d), skipped)
    spec, wanted = _cat_plan(known, d)
    dim_out = spec.dims[d]
    own = fit(spec.mesh, spec.varying, *zip(parts, wanted, strict=True))
    if not skipped and not _torch.is_tracing() and not _torch.transforming():
        at = tuple(dims[d] for dims in wanted)
        if dim_out.axes and stays(parts, known, d):
            return join(own, at, d, spec)
    pieces = list(own)
    if dim_out.axes:
        group = comm.along(spec, d)
        start = 0
        for i, (x, dims) in enumerate(zip(parts, wanted, strict=True)):
            # what of this part lies within each rank's interval of the result
            stop = start + x.shape[d]
            windows = dim_out.clipped(start, stop).spans
            pieces[i] = comm.window(pieces[i], d, dims[d].sizes, windows, group)
            start = stop
    local = joined(pieces, d)
    if dim_out.axes:
        forms = {memory_format(x) for x in parts}
        if torch.contiguous_format not in forms:
            # pieces without rows are in no format, nor is then the result
            local = local.contiguous(memory_format=forms.pop())
    return wrap(_with_gradients(local, skipped), spec)


def _with_gradients(local: Tensor, skipped: Sequence[Tensor]) -> Tensor:
    """Legacy empty parts, of shape (0,) among others, have no rows; but a dtype and a gradient."""
    for x in skipped:
        local = local.to(torch.promote_types(local.dtype, x.dtype))
        if _torch.differentiated(x) and (local.is_floating_point() or local.is_complex()):
            local = local + local_of(x).sum()
    return local


@cached
def _cat_plan(known: tuple[Known, ...], d: int) -> tuple[Spec, tuple[tuple[Dim, ...], ...]]:
    """(spec of the result, the dims in which each part is wanted).

    By hand: along the joined dim no part is cut as another, and the result as none.
    """
    specs = [k for k in known if isinstance(k, Spec)]
    main = max(specs, key=lambda s: (bool(s.varying), s.shape.numel()))
    rows = [k.shape[d] if isinstance(k, Spec) else k[d] for k in known]
    axes = main.dims[d].axes
    if not axes:
        return main.replace({d: Dim(sum(rows))}), tuple(
            main.replace({d: Dim(n)}).dims for n in rows
        )
    ranks = len(main.dims[d].sizes)
    cut = [k.dims[d] if isinstance(k, Spec) and k.dims[d].axes == axes else None for k in known]
    sharded = [i for i, c in enumerate(cut) if c is not None]
    parts = [c or Dim.chunked(n, axes, main.mesh) for c, n in zip(cut, rows, strict=True)]
    sizes = Dim.chunked(sum(rows), axes, main.mesh).sizes
    if len(sharded) == 1:
        # it stays; what comes before it goes to the first rank, what comes after to the last
        at = sharded[0]
        edge = [(0 if i < at else ranks - 1) for i in range(len(rows))]
        ends = [
            c or Dim(n, axes, tuple(n if r == e else 0 for r in range(ranks)))
            for c, n, e in zip(cut, rows, edge, strict=True)
        ]
        found = tuple(sum(p.sizes[r] for p in ends) for r in range(ranks))
        # unless these are so many that a rank would have more than twice its share
        if ends[at].is_crowded or not Dim(sum(rows), axes, found).is_crowded:
            parts, sizes = ends, found
    spec = main.replace({d: Dim(sum(rows), axes, sizes)})
    return spec, tuple(main.replace({d: p}).dims for p in parts)


@rule("stack")
def stack(tensors: Sequence[Tensor], dim: int = 0) -> ShardTensor:
    parts = [reduced(x) for x in tensors]
    d = checked_dim(dim, parts[0].ndim + 1)
    if any(x.shape != parts[0].shape for x in parts):
        raise RuntimeError("stack expects each tensor to be equal size")
    spec, wanted = align(*parts)
    local = fit(spec.mesh, spec.varying, *zip(parts, wanted, strict=True))
    return wrap(torch.stack(local, d), spec.insert(d, Dim(len(parts))))


@rule("roll")
def roll(input: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return roll(input.reshape(-1), shifts, 0).reshape(input.shape)
    assert isinstance(input, ShardTensor)
    x = reduced(input)
    local = x._local
    for shift, dim in zip(many(shifts), many(dims), strict=True):
        d = checked_dim(dim, x.ndim)
        spec_dim = x._spec.dims[d]
        s = shift % max(1, spec_dim.size)
        if not s or not spec_dim.axes:
            local = local.roll(s, d)
        else:
            group = comm.along(x._spec, d)
            windows = spec_dim.windows(s, -s)
            local = comm.window(local, d, spec_dim.sizes, windows, group, wrap=True)
    return wrap(local, x._spec)


@cached
def _mirrored(dim: Dim) -> Kept[tuple[int, int]]:
    return Kept((dim.size - b, dim.size - a) for a, b in dim.windows())


@rule("flip")
def flip(input: ShardTensor, *dims: Any, **kwargs: Any) -> ShardTensor:
    x = reduced(input)
    local = x._local
    given = dims or ((kwargs["dims"],) if "dims" in kwargs else ())
    # torch takes 0 and -1 as dims of a scalar
    mirrored = [checked_dim(d, max(x.ndim, 1)) for d in many(given[0], given[1:])] if given else []
    mirrored = mirrored if x.ndim else []
    stored = layout.order(x)
    if stored:
        at = [stored.index(d) for d in mirrored]
        return layout.as_stored(lambda y: flip(y, at), x, stored)
    for d in mirrored:
        dim = x._spec.dims[d]
        if dim.axes:
            local = comm.window(local, d, dim.sizes, _mirrored(dim), comm.along(x._spec, d))
    return wrap(local.flip(mirrored), x._spec)


@rule("fliplr")
def fliplr(input: ShardTensor) -> ShardTensor:
    if input.ndim < 2:
        raise RuntimeError("Input must be >= 2-d.")
    return flip(input, 1)


@rule("flipud")
def flipud(input: ShardTensor) -> ShardTensor:
    if not input.ndim:
        raise RuntimeError("Input must be >= 1-d.")
    return flip(input, 0)


@rule("tile")
def tile(input: ShardTensor, *dims: Any, **kwargs: Any) -> ShardTensor:
    times = _times(dims, kwargs)
    return repeat(input, (1,) * (input.ndim - len(times)) + times)


def _times(given: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    first = given[0] if given else kwargs.get("repeats", kwargs.get("dims"))
    return many(first, given[1:])


@rule("repeat")
def repeat(input: ShardTensor, *repeats: Any, **kwargs: Any) -> ShardTensor:
    times = _times(repeats, kwargs)
    if len(times) < input.ndim:
        raise RuntimeError(
            "Number of dimensions of repeat dims can not be smaller than number of dimensions of "
            "tensor"
        )
    x = reduced(input)
    lead = len(times) - x.ndim
    local, dims = x._local, []
    plain = list(times)
    for d, dim in enumerate(x._spec.dims):
        k = times[lead + d]
        dims.append(dim.scaled(k))
        if dim.axes:
            plain[lead + d] = 1
            group = comm.along(x._spec, d)
            local = comm.window(local, d, dim.sizes, dims[-1].spans, group, wrap=True)
    return wrap(local.repeat(plain), x._spec.with_dims([*whole_dims(times[:lead]), *dims]))

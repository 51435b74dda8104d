"""Sliding blocks: F.unfold, F.fold, Tensor.unfold, rot90 on sharded images.

F.unfold (N, C, H, W) to (N, C kh kw, L): a rank makes the block rows whose centres it has, from its
rows and a halo; L is cut at whole block rows. Sharded columns become sharded rows first, which
moves less than moving the blocks would. F.fold is the adjoint: a rank adds up the blocks that it
has, and what its image rows share with a neighbour's goes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import comm
from ..._torch import kernels
from ...cache import cached
from ...dispatch.fallback import fall_back
from ...registry import rule
from ...spec import Dim, Spec
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import reduced, to_dims
from ..operands import checked_dim
from ..sliding import sliding
from ..views.reshape_plan import gathered_on_lead, on_multiples
from ..windows import Ints, Stencil, added_to, each, fetch, spread, stencils, strided

_im2col, _col2im = kernels.nn.im2col, kernels.nn.col2im


@rule("im2col")
def im2col(
    input: ShardTensor, kernel_size: Ints, dilation: Ints, padding: Ints, stride: Ints
) -> ShardTensor:
    """The block rows whose centres this rank has, from its rows and a halo."""
    x = reduced(input)
    k, d, p, s = (each(v, 2) for v in (kernel_size, dilation, padding, stride))
    shape = _shape(_im2col, tuple(x.shape), k, d, p, s)
    h, w = x.ndim - 2, x.ndim - 1
    if x._spec.dims[w].axes:
        rows = gathered_on_lead(x._spec, [h, w], h)
        x = to_dims(x, [*x._spec.dims[:h], rows, Dim(x.shape[w])])
    spec = x._spec
    channels = _times(spec.dims[h - 1], k[0] * k[1])
    blocks, local = Dim(shape[-1]), x._local
    image = spec.dims[h]
    if image.axes:
        high, across = stencils(2, k, s, p, d)
        wide = across.outputs(x.shape[w])
        reach = strided(image, high)
        blocks = _times(reach.dim, wide)
        local, p = fetch(local, h, spec, reach), (0, p[1])
    out = spec.with_dims([*spec.dims[: h - 1], channels, blocks])
    if 0 in local.shape[:h]:
        return wrap(_none(local, out), out)
    local = _im2col(local, k, d, p, s)
    return wrap(local.narrow(-1, 0, blocks.sizes[spec.index[h]]) if image.axes else local, out)


@rule("col2im")
def col2im(
    input: ShardTensor,
    output_size: Ints,
    kernel_size: Ints,
    dilation: Ints,
    padding: Ints,
    stride: Ints,
) -> ShardTensor:
    """Each rank adds up its blocks; rows that it shares with a neighbour go there."""
    x = reduced(input)
    size, k, d, p, s = (each(v, 2) for v in (output_size, kernel_size, dilation, padding, stride))
    shape = _shape(_col2im, tuple(x.shape), size, k, d, p, s)
    high, across = stencils(2, k, s, p, d)
    wide = across.outputs(size[1])
    c, blocks = x.ndim - 2, x.ndim - 1
    dims = list(x._spec.dims)
    for i, q in ((c, k[0] * k[1]), (blocks, wide)):
        dims[i] = on_multiples(dims[i], q) if dims[i].axes else dims[i]
    x = to_dims(x, dims)
    local, index = x._local, x._spec.index[blocks]
    channels = Dim(shape[-3], dims[c].axes, tuple(n // (k[0] * k[1]) for n in dims[c].sizes))
    image = Dim(size[0])
    if not dims[blocks].axes:
        out = x._spec.with_dims([*dims[:c], channels, image, Dim(size[1])])
        empty = 0 in local.shape[:blocks]
        return wrap(_none(local, out) if empty else _col2im(local, size, k, d, p, s), out)
    rows = Dim(x.shape[blocks] // wide, dims[blocks].axes, _divided(dims[blocks].sizes, wide))
    image = spread(rows, high, size[0])[0].dim
    out = x._spec.with_dims([*dims[:c], channels, image, Dim(size[1])])
    windows = added_to(rows, high)
    start, stop = windows[index]
    if 0 in local.shape:
        part = _none(local, out, stop - start)
    else:
        part = _col2im(local, (stop - start, size[1]), k, d, (0, p[1]), s)
    group = comm.group(x._spec.mesh, rows.axes)
    return wrap(comm.window_add(part, part.ndim - 2, image.sizes, windows, group), out)


@cached
def _shape(op: Any, shape: tuple[int, ...], *args: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of op's result; raises what torch raises."""
    return tuple(op(torch.empty(shape, device="meta"), *args).shape)


def _times(dim: Dim, n: int) -> Dim:
    return Dim(dim.size * n, dim.axes, tuple(m * n for m in dim.sizes))


def _divided(sizes: Sequence[int], n: int) -> tuple[int, ...]:
    return tuple(m // n for m in sizes)


def _none(local: Tensor, out: Spec, rows: int | None = None) -> Tensor:
    """A result without elements that is part of local's graph; rows: of the image, instead."""
    shape = list(out.local_shape)
    if rows is not None:
        shape[-2] = rows
    return local.new_zeros(shape) + local.sum(dtype=local.dtype)


@rule("unfold")
def unfold(input: ShardTensor, dimension: int, size: int, step: int) -> ShardTensor:
    """Windows of dim `dimension` along a new last dim; a view where no rank needs others' rows."""
    if input.ndim == 0:
        return fall_back(torch.Tensor.unfold, (input, dimension, size, step), {})
    x = reduced(input)
    d = checked_dim(dimension, x.ndim)
    spec, dim = x._spec, x._spec.dims[d]
    if not dim.axes:
        local = x._local.unfold(d, size, step)
        dims = [*spec.dims, Dim(size)]
        dims[d] = Dim(local.shape[d])
        return wrap(local, spec.with_dims(dims))
    if not 0 < size <= dim.size or step <= 0:
        return fall_back(torch.Tensor.unfold, (x, d, size, step), {})
    return sliding(
        x, {d: Stencil(size, step)}, lambda rows: rows.unfold(d, size, step), view="unfold"
    )


@rule("rot90")
def rot90(input: ShardTensor, k: int = 1, dims: Sequence[int] = (0, 1)) -> Tensor:
    if len(dims) != 2:
        raise RuntimeError(f"expected total rotation dims == 2, but got dims = {len(dims)}")
    if input.ndim < 2:
        raise RuntimeError(f"expected total dims >= 2, but got total dims = {input.ndim}")
    a, b = (checked_dim(d, input.ndim) for d in dims)
    if a == b:
        raise RuntimeError(f"expected rotation dims to be different, but got dim0 = dim1 = {a}")
    if k % 4 == 0:
        return input.clone(memory_format=torch.contiguous_format)
    if k % 4 == 2:
        return input.flip(a, b)
    return input.flip(b if k % 4 == 1 else a).transpose(a, b)

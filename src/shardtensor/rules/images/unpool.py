"""Max-unpooling: values go to flat places of the plane, which only their values tell.

Where planes are whole: local. Else the ranks tell each other, in one small all-reduce, to which
output rows each input row goes, and each fetches the input rows that fall in its output rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import _torch, comm
from ..._torch import kernels
from ...errors import UnsupportedOpError
from ...registry import rule
from ...spec import Spec, whole_dims
from ...tensor import ShardTensor, wrap
from ...tensor.recut import aside
from ...tensor.redistribute import fit, reduced
from ..flat import coordinates, positions
from ..pointwise import align


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(
    input: Tensor,
    indices: Tensor,
    output_size: Sequence[int],
    stride: Any = None,
    padding: Any = None,
) -> ShardTensor:
    """With a stride, which is not used: 3-D. Which of two values in one place wins is undefined."""
    n = len(output_size)
    size = tuple(int(m) for m in output_size)
    kernel = kernels.nn.max_unpool2d if n == 2 else kernels.nn.max_unpool3d
    rest = () if n == 2 else (stride, padding)
    if input.shape != indices.shape:
        raise RuntimeError(
            f"Expected shape of indices to be that of the input tensor ({tuple(input.shape)}) but "
            f"got indices tensor with shape: {tuple(indices.shape)}"
        )
    operands = [reduced(x) for x in (input, indices)]
    spec, wanted = align(*operands)
    lead = input.ndim - n
    if any(d.axes for d in spec.dims[lead:]) and _torch.is_tracing():
        whole = aside(wrap(operands[0].new_empty(spec.local_shape), spec), range(lead, input.ndim))
        if whole is None:
            raise UnsupportedOpError(
                f"max_unpool{n}d on {spec}: where values go depends on them, which st.compile "
                "cannot hold; shard the batch or channels"
            )
        spec = whole._spec
        wanted = (spec.dims, spec.dims)
    x, at = fit(spec.mesh, spec.varying, *zip(operands, wanted, strict=True))
    if not any(d.axes for d in spec.dims[lead:]):
        out = spec.with_dims([*spec.dims[:lead], *whole_dims(size)])
        if 0 in x.shape[:lead]:
            return wrap(x.new_zeros(out.local_shape) + x.sum(dtype=x.dtype), out)
        return wrap(kernel(x, at, size, *rest), out)
    return _spread(x, at, spec, size)


def _spread(x: Tensor, at: Tensor, spec: Spec, size: tuple[int, ...]) -> ShardTensor:
    """Each rank fetches the input rows that fall in its output rows, and fills in their values."""
    lead, total = x.ndim - len(size), prod(size)
    cut = [i for i in range(len(size)) if spec.dims[lead + i].axes]
    known = _known(coordinates(at, size), at, spec, lead, cut)
    first, last = known.pop(0)[0], -known.pop(0)[0]
    if first < 0 or last >= total:
        raise RuntimeError(
            f"Found an invalid max index: {first if first < 0 else last} "
            f"(output volumes are of size {'x'.join(map(str, size))})"
        )
    dims = [*spec.dims[:lead], *whole_dims(size)]
    for i in cut:
        d, dim = lead + i, spec.dims[lead + i]
        edges = [o * size[i] // dim.size for o in dim.offsets]
        dims[d] = dim.cut_at(edges)
        low, high = known.pop(0), [-n for n in known.pop(0)]
        windows = [_rows(low, high, a, b) for a, b in dims[d].spans]
        group = comm.along(spec, d)
        if comm.spreads(group, "rows are taken to fall where they were pooled from"):
            windows = list(dim.spans)
        x = comm.window(x, d, dim.sizes, windows, group)
        at = comm.window(at, d, dim.sizes, windows, group)
    out = spec.with_dims(dims)
    plane = out.local_shape[lead:]
    own = [c - start for c, start in zip(coordinates(at, size), out.offset[lead:], strict=True)]
    inside = torch.ones_like(at, dtype=torch.bool)
    for c, n in zip(own, plane, strict=True):
        inside = inside & (c >= 0) & (c < n)
    # what falls in others' rows goes behind the plane
    here = positions(own, plane).where(inside, prod(plane)).flatten(lead)
    local = x.new_zeros([*x.shape[:lead], prod(plane) + 1])
    local = local.scatter(-1, here, x.flatten(lead)).narrow(-1, 0, prod(plane))
    return wrap(local.reshape(out.local_shape).contiguous(), out)


def _known(
    places: list[Tensor], at: Tensor, spec: Spec, lead: int, cut: Sequence[int]
) -> list[list[int]]:
    """The smallest flat place, the largest, negated; then for each sharded dim the smallest output
    row, and the largest, negated, of each input row. One all-reduce.
    """
    far = torch.iinfo(torch.int64).max
    parts = [at.new_full((1,), n) for n in (far, 1)]
    if at.numel():
        parts = [at.min()[None], -at.max()[None]]
    for i in cut:
        d = lead + i
        others = [e for e in range(at.ndim) if e != d]
        for values, init in ((places[i], far), (-places[i], 1)):
            rows = at.new_full((spec.dims[d].size,), init)
            if at.numel():
                rows.narrow(0, spec.offset[d], at.shape[d]).copy_(values.amin(others))
            parts.append(rows)
    # at once: each look waits for a GPU
    every = comm.reduce(torch.cat(parts), comm.group(spec.mesh, spec.varying), "min").tolist()
    ends = [0, *accumulate(p.numel() for p in parts)]
    return [every[a:b] for a, b in pairwise(ends)]


def _rows(low: Sequence[int], high: Sequence[int], a: int, b: int) -> tuple[int, int]:
    """The input rows, from the first to the last one of which a part falls in [a, b)."""
    hit = [r for r, (m, n) in enumerate(zip(low, high, strict=True)) if n >= a and m < b]
    return (hit[0], hit[-1] + 1) if hit and a < b else (0, 0)

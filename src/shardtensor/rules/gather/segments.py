"""Runs of rows: each reduced where its first row lies, or multiplied where its rows are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import _torch
from ...dispatch.fallback import fall_back
from ...registry import rule
from ...spec import Dim
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import fit, reduced
from ..pointwise import function_rule
from ..rows import Kernel, write
from .scatter import by_row, reduce_kernel

# what stands for a segment without rows
_EMPTY = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "max": float("-inf"), "min": float("inf")}


def _kernel(reduce: str) -> Kernel:
    kernel = reduce_kernel(reduce, True)
    assert kernel is not None
    return by_row(kernel)


class _Extremum(_torch.Function):
    """Rows with the extrema of the values at numbers `at`; the gradient of torch's kernel.

    A NaN counts as an extremum, what the rows held does not: a positive gradient is shared by those
    that are equal, a negative one goes whole to each. torch has no second derivative either.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, at: Tensor, values: Tensor, reduce: str) -> Tensor:
        ctx.materialize_grads = False
        out = _kernel(reduce)(rows, at, values)
        ctx.save_for_backward(at, values, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None, Tensor | None, None]:
        if grad is None:
            return None, None, None, None
        at, values, out = ctx.saved_tensors
        chosen = (values == out[at]) | values.isnan()
        count = torch.zeros_like(out, dtype=torch.int64).index_add(0, at, chosen.long())
        share = torch.where(grad > 0, grad / count, grad)
        return None, None, torch.where(chosen, share[at], 0), None


def _extremum(reduce: str) -> Kernel:
    return lambda rows, at, values: _Extremum.apply(rows, at, values, reduce)


_KERNELS = {
    "sum": None, "mean": None, "prod": _kernel("prod"),
    "max": _extremum("amax"), "min": _extremum("amin"),
}  # fmt: skip


@function_rule("segment_reduce")
def segment_reduce(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Along dim 0, where it is cut; segments beyond a shard's end add what they have to the first.

    The result is cut where the segments begin. Any other call falls back.
    """
    data, reduce, lengths, offsets, initial, rest = _arguments(*args, **kwargs)
    known = lengths if offsets is None else offsets
    if rest or not isinstance(data, ShardTensor) or not isinstance(known, Tensor):
        return fall_back(func, args, kwargs)
    rows = data._spec.dims[0] if data.ndim else Dim(0)
    served = known.ndim == 1 and known.dtype in (torch.int32, torch.int64)
    if not rows.axes or not served or not data.dtype.is_floating_point:
        return fall_back(func, args, kwargs)
    # numbers of rows, which all ranks need: the only message that is as long as the segments
    known = known.full_tensor() if isinstance(known, ShardTensor) else known
    if offsets is None:
        known = torch.cat([known.new_zeros(1), known.cumsum(0)])
    known = known.long()
    if len(known) < 2 or int(known[0]) or int(known[-1]) != rows.size or (known.diff() < 0).any():
        return fall_back(func, args, kwargs)
    x = reduced(data)
    n = len(known) - 1
    inner = torch.tensor(rows.offsets[1:-1], device=known.device)
    ends = torch.searchsorted(known[:-1], inner).tolist()
    target = Dim(n, rows.axes, [b - a for a, b in pairwise([0, *ends, n])])
    spec = x._spec
    first, last = spec.spans[0]
    number = torch.arange(first, last, device=known.device)
    index = wrap(torch.bucketize(number, known[1:], right=True), spec.with_dims([rows]))
    wide = spec.with_dims([target, *spec.dims[1:]])
    first_value = _EMPTY[reduce] if initial is None else initial
    start = x._local.new_full(tuple(wide.local_shape), first_value)
    out = write(wrap(start, wide), index, x, _KERNELS[reduce], negative=None, op="segment_reduce")
    if reduce != "mean":
        return out
    a, b = out._spec.spans[0]
    count = known.diff()[a:b].to(out._local)
    # an empty one is what it began with; without that it has no mean
    count = count if initial is None else count.clamp(min=1)
    return wrap(out._local / count.view(-1, *[1] * (out.ndim - 1)), out._spec)


def _arguments(
    data: Tensor,
    reduce: str,
    lengths: Any = None,
    indices: Any = None,
    offsets: Any = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: Any = None,
) -> tuple[Any, str, Any, Any, Any, bool]:
    """(data, reduce, lengths, offsets, initial, whether something else is asked for)."""
    reduce = {"amax": "max", "amin": "min"}.get(reduce, reduce)
    other = indices is not None or axis != 0 or reduce not in _EMPTY
    return data, reduce, lengths, offsets, initial, other or (lengths is None) == (offsets is None)


@rule("_grouped_mm")
def grouped_mm(
    input: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Each group of rows times a matrix of its own; every rank multiplies the rows that it has."""
    spec = input._spec if isinstance(input, ShardTensor) else None
    cut = [] if spec is None or spec.partial else [bool(d.axes) for d in spec.dims]
    whole = not isinstance(offs, ShardTensor) and bias is None
    if spec is None or offs is None or not whole or cut != [True, False] or mat2.ndim != 3:
        return fall_back(torch._grouped_mm, (input, mat2, offs, bias, out_dtype), {})
    rows = spec.dims[0]
    local, matrices = fit(spec.mesh, spec.varying, (input, spec.dims), (mat2, None))
    own = (offs - rows.offsets[spec.index[0]]).clamp(0, spec.local_shape[0])
    # shards end anywhere; of columns in memory CUDA asserts groups of multiples of 16 bytes
    y = torch._grouped_mm(local.contiguous(), matrices, offs=own, out_dtype=out_dtype)
    return wrap(y, spec.with_dims([rows, Dim(mat2.shape[2])]))

"""segment_reduce: runs of rows, each reduced where its first row lies."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..dispatch.fallback import fall_back
from ..spec import Dim
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import reduced
from .pointwise import function_rule
from .rows import write
from .scatter import by_row, reduce_kernel

# what stands for a segment without rows
_EMPTY = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "max": float("-inf"), "min": float("inf")}
_KERNELS = {"prod": "prod", "max": "amax", "min": "amin"}


@function_rule("segment_reduce")
def segment_reduce(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Along dim 0, where it is cut; segments beyond a shard's end add what they have to the first.

    The result is cut where the segments begin. Any other call falls back. Equal extrema share
    their gradient, of either sign, as those of amax do; torch's kernel gives a negative one whole
    to each, and that of a segment with NaN to the NaN alone.
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
    # an extremum has all of the gradient, also where it is what it began with
    bound = initial if reduce in ("max", "min") else None
    first_value = _EMPTY[reduce] if initial is None or bound is not None else initial
    start = x._local.new_full(tuple(wide.local_shape), first_value)
    kernel = reduce_kernel(_KERNELS[reduce], True) if reduce in _KERNELS else None
    kernel = None if kernel is None else by_row(kernel)
    out = write(wrap(start, wide), index, x, kernel, negative=None, op="segment_reduce")
    if bound is not None:
        local = out._local
        beaten = local < bound if reduce == "max" else local > bound
        return wrap(local.masked_fill(beaten, bound), out._spec)
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

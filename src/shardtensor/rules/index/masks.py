"""Results whose size depends on values: masks, nonzero, repeats.

They stay sharded along their first dim, in sizes that the ranks tell each other. Their order is
that of the whole tensor, so the dims that a mask covers are sharded along the first one only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _torch, comm
from ...comm.constants import constant
from ...errors import UnsupportedOpError
from ...registry import rule
from ...spec import Dim, Spec
from ...tensor import ShardTensor, layout, wrap
from ...tensor.recut import on_dim
from ...tensor.redistribute import fit, reduced, to_dims
from .. import labels
from ..in_place import assigned
from ..operands import checked_dim, lifted
from ..pointwise import function_rule, pointwise
from ..views.shape import permuted

# a mask that is whole on each rank is counted in so many parts, of so many elements at least
_PARTS, _SOME = 16, 2**16


def is_mask(e: Any) -> bool:
    """Whether an entry of an index is a boolean tensor."""
    return isinstance(e, Tensor) and e.dtype in (torch.bool, torch.uint8)


def without_lead(values: Tensor, ndim: int) -> Tensor:
    """Values for ndim dims, which may have more leading dims of one."""
    while values.ndim > ndim and values.shape[0] == 1:
        values = values.squeeze(0)
    return values


def learnt(n: int, like: Tensor, dim: Dim, spec: Spec) -> Dim:
    """A dim of which every rank that shards `dim` has n rows of its own."""
    sizes = _counts(n, like, dim, spec)
    return Dim(sum(sizes), dim.axes, sizes) if dim.axes else Dim(n)


def _counts(n: int, like: Tensor, dim: Dim, spec: Spec) -> Sequence[int]:
    return comm.counts(n, like, comm.group(spec.mesh, dim.axes)) if dim.axes else [n]


def _true(n: Callable[[], int], m: Tensor, mask: Tensor, dim: Dim, spec: Spec) -> Dim:
    """The rows where a mask is true, of which this rank has n() in its own part m.

    One that every rank has whole tells those of the others, too.
    """
    is_cut = isinstance(mask, ShardTensor) and (mask._spec.varying or mask._spec.partial)
    if not dim.axes or is_cut:
        return learnt(n(), m, dim, spec)
    whole = mask._local if isinstance(mask, ShardTensor) else mask
    ends = constant(tuple(dim.offsets), torch.int64, whole)
    sizes = _before(whole.flatten(), ends).diff().tolist()
    return Dim(sum(sizes), dim.axes, tuple(sizes))


def _before(mask: Tensor, ends: Tensor) -> Tensor:
    """How many are true before each of these places, in parts: running sums take 8 bytes each."""
    found, first = torch.zeros_like(ends), 0
    for part in mask.split(max(_SOME, -(-len(mask) // _PARTS))):
        sums = F.pad(part.bool().cumsum(0), (1, 0))
        found += sums[(ends - first).clamp(0, len(part))]
        first += len(part)
    return found


def _eager(op: str, spec: Spec) -> None:
    if _torch.is_tracing():
        raise UnsupportedOpError(
            f"{op} on {spec}: the size of the result depends on values, so it cannot be compiled; "
            "leave it out of st.compile or use torch.where"
        )


# masks -------------------------------------------------------------------------------------------


def _meet(x: Tensor, d: int, mask: Tensor) -> tuple[Tensor, Tensor, Spec]:
    """(x with the masked dims as one, the first; the flat mask; the spec), on local tensors."""
    k = mask.ndim
    if x.shape[d : d + k] != mask.shape:
        raise IndexError(
            f"The shape of the mask {list(mask.shape)} does not match the shape of the indexed "
            f"tensor {list(x.shape)} at index {d}"
        )
    x, mask = map(reduced, (x, mask))
    y = x.movedim(tuple(range(d, d + k)), tuple(range(k))) if d else x
    if k > 1:
        y, mask = y.flatten(0, k - 1), mask.flatten()
    rows = tuple(f"d{i}" for i in range(y.ndim))
    p = labels.plan((rows, rows[:1], rows), y, mask, order=(0, 1))
    _eager("a mask", p.out)
    a, b = p.fit((y, mask))
    return a, b.bool(), p.out


def masked(x: Tensor, d: int, mask: Tensor) -> ShardTensor:
    """x[:, ..., mask] with the mask at dims d, d + 1, ...: the rows where it is true."""
    y, m, spec = _meet(x, d, mask)
    out = y[m]
    rows = _true(lambda: len(out), m, mask, spec.dims[0], spec)
    made = wrap(out, spec.replace({0: rows}))
    return permuted(made, [*range(1, d + 1), 0, *range(d + 1, made.ndim)]) if d else made


def mask_put(x: ShardTensor, d: int, mask: Tensor, values: Tensor) -> ShardTensor:
    """x with values, which broadcast, written where a mask at dims d, d + 1, ... is true."""
    k = mask.ndim
    after = x.ndim - d - k
    values = without_lead(values, d + 1 + after)
    if values.ndim <= after or values.shape[-1 - after] == 1:
        # the same for all rows
        if values.ndim > after:
            one = [
                *values.shape[: values.ndim - after - 1],
                *[1] * k,
                *values.shape[values.ndim - after :],
            ]
            values = values.reshape(one)
        out = torch.where(mask.bool().reshape(*mask.shape, *[1] * after), values.to(x.dtype), x)
        assert isinstance(out, ShardTensor)
        return to_dims(out, x._spec.dims)
    y, m, spec = _meet(x, d, mask)
    rows = _true(lambda: int(m.sum()), m, mask, spec.dims[0], spec)
    v = values.expand(*x.shape[:d], rows.size, *x.shape[d + k :])
    v = v.movedim(d, 0) if d else v
    (v,) = fit(spec.mesh, spec.varying, (v, (rows, *spec.dims[1:])))
    return _back(wrap(y.index_put((m,), v), spec), x, d, k)


def _back(flat: ShardTensor, x: ShardTensor, d: int, k: int) -> ShardTensor:
    """What `_meet` made of x, in the dims of x again."""
    y: Tensor = flat.unflatten(0, x.shape[d : d + k]) if k > 1 else flat
    y = y.movedim(tuple(range(k)), tuple(range(d, d + k))) if d else y
    assert isinstance(y, ShardTensor)
    return to_dims(y, x._spec.dims)


def _broadcast(input: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(input.shape, mask.shape)
    found = []
    for t in (input, mask):
        t = t if t.shape == shape else t.expand(shape)
        found.append(t.reshape(1) if t.ndim == 0 else t)
    return found[0], found[1]


@rule("masked_select")
def masked_select(input: Tensor, mask: Tensor) -> ShardTensor:
    if mask.dtype not in (torch.bool, torch.uint8):
        raise RuntimeError("masked_select: expected BoolTensor for mask")
    x, m = _broadcast(input, mask)
    return masked(x, 0, m)


@rule("masked_scatter")
def masked_scatter(input: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The true places take the elements of source in the order of the whole tensor."""
    if mask.dtype is not torch.bool:
        raise RuntimeError("masked_scatter_ only supports boolean masks")
    if input.dtype != source.dtype:
        raise RuntimeError("masked_scatter: expected self and source to have same dtypes")
    shape = torch.broadcast_shapes(input.shape, mask.shape)
    x, m = _broadcast(input, mask)
    x = lifted(x, mask, source)
    y, at, spec = _meet(x, 0, m)
    rows = learnt(int(at.sum()), at, spec.dims[0], spec)
    if rows.size > source.numel():
        raise RuntimeError("masked_scatter: expected the source to have as many elements as mask")
    v = source.reshape(-1)[: rows.size]
    (v,) = fit(spec.mesh, spec.varying, (v, (rows,)))
    return _back(wrap(y.masked_scatter(at, v), spec), x, 0, m.ndim).reshape(shape)


@rule("_unsafe_masked_index")
def unsafe_masked_index(input: Tensor, mask: Tensor, indices: Any, fill: Any) -> Tensor:
    """input[indices] where the mask is true, whatever the other indices are; fill elsewhere."""
    return input[_clamped(input, indices)].masked_fill(~mask.bool(), fill)


@rule("_unsafe_masked_index_put_accumulate")
def unsafe_masked_index_put_accumulate(
    input: Tensor, mask: Tensor, indices: Any, values: Tensor
) -> Tensor:
    index = _clamped(input, indices)
    known = [e for e in index if isinstance(e, Tensor)]
    return torch.ops.aten.index_put(
        lifted(input, mask, *known, values),
        [e if isinstance(e, Tensor) else None for e in index],
        values.masked_fill(~mask.bool(), 0),
        True,
    )


def _clamped(x: Tensor, indices: Any) -> tuple[Any, ...]:
    """Indices into range: those of entries that a mask leaves out may be any."""
    return tuple(
        slice(None) if e is None else e.clamp(-x.shape[d], x.shape[d] - 1)
        for d, e in enumerate(indices)
    )


# places ------------------------------------------------------------------------------------------


def _on_first(x: ShardTensor) -> ShardTensor:
    """x with all its shards along its first dim of more than one row."""
    x = reduced(x)
    return on_dim(x, next((d for d, n in enumerate(x.shape) if n > 1), 0))


@rule("nonzero")
def nonzero(input: ShardTensor, *, as_tuple: bool = False) -> Any:
    """(places, dims of input), sharded along the places."""
    return places(input) if as_tuple else _nonzero(input)


@rule("argwhere")
def argwhere(input: ShardTensor) -> ShardTensor:
    return _nonzero(input)


def _nonzero(input: ShardTensor) -> ShardTensor:
    x = input.detach()
    if not x.ndim:
        return wrap(reduced(x)._local.nonzero(), Spec(x._spec.mesh, (Dim(int(bool(x))), Dim(0))))
    x = _on_first(x)
    spec = x._spec
    _eager("nonzero", spec)
    found = x._local.nonzero()
    start = torch.tensor(spec.offset, device=found.device)
    lead = next((d for d in spec.dims if d.axes), Dim(0))
    rows = learnt(len(found), found, lead, spec)
    # torch gives all numbers of one dim after the other
    return layout.told(wrap(found + start, spec.with_dims([rows, Dim(x.ndim)])), (1, rows.size))


def places(mask: Tensor) -> tuple[Tensor, ...]:
    """The indices of what is not zero, one vector for each dim."""
    if not isinstance(mask, ShardTensor):
        return mask.nonzero(as_tuple=True)
    flat: Any = mask if mask.ndim else mask.reshape(1)
    return _nonzero(flat).unbind(1)


@function_rule("where")
def where(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A choice by element; the places of a condition alone."""
    if len(args) + len(kwargs) == 1:
        return places(*args, *kwargs.values())
    return pointwise(func, args, kwargs)


@rule("nonzero_static")
def nonzero_static(input: ShardTensor, *, size: int, fill_value: int = -1) -> ShardTensor:
    if size < 0:
        raise RuntimeError(f"nonzero_static: 'size' must be an non-negative integer, not {size}")
    found: Any = _nonzero(input).contiguous()
    rows, of = found._spec.dims
    if not rows.axes:
        short = max(0, size - rows.size)
        local = torch.nn.functional.pad(found._local[:size], (0, 0, 0, short), value=fill_value)
        return wrap(local, found._spec.with_dims([Dim(size), of]))
    new = Dim.chunked(size, rows.axes, found._spec.mesh)
    group = comm.along(found._spec, 0)
    # rows past the last are fill
    local = comm.window(found._local, 0, rows.sizes, new.spans, group, fill=fill_value)
    return wrap(local, found._spec.with_dims([new, of]))


# repeats -----------------------------------------------------------------------------------------


@rule("repeat_interleave")
def repeat_interleave(
    input: Tensor, repeats: Any = None, dim: int | None = None, *, output_size: int | None = None
) -> ShardTensor:
    """Every rank repeats its own rows; alone, repeats gives the number of each row."""
    if repeats is None:
        whole = torch.arange(len(input), device=input.device)
        return repeat_interleave(whole, input, 0, output_size=output_size)
    x: Any = lifted(input, repeats)
    if dim is None or x.ndim == 0:
        x, dim = x.reshape(-1), 0
    d = checked_dim(dim, x.ndim)
    own = x._spec.dims[d]
    if isinstance(repeats, Tensor) and repeats.numel() == 1 and repeats.ndim <= 1:
        repeats = int(repeats)
    if not isinstance(repeats, Tensor):
        rows = x._spec.replace({d: own.scaled(repeats)})
        return wrap(x._local.repeat_interleave(repeats, d), rows)
    if repeats.shape != (own.size,):
        raise RuntimeError("repeats must have the same size as input along dim")
    each = tuple(f"d{i}" for i in range(x.ndim))
    p = labels.plan((each, (each[d],), each), x, repeats, order=(0, 1))
    spec = p.out
    _eager("repeat_interleave", spec)
    local, times = p.fit((x, repeats))
    error, out = None, local
    try:
        out = local.repeat_interleave(times, d)
    except RuntimeError as e:
        # of a negative number, which goes to all in the place of the size
        error = e
    sizes = _counts(-1 if error else out.shape[d], out, spec.dims[d], spec)
    if min(sizes) < 0:
        raise error or RuntimeError("repeats can not be negative")
    rows = Dim(sum(sizes), spec.dims[d].axes, sizes if spec.dims[d].axes else ())
    if output_size is not None and output_size != rows.size:
        raise RuntimeError(f"allocated size {output_size} does not match required size {rows.size}")
    return wrap(out, spec.replace({d: rows}))


@rule("masked_scatter_")
def masked_scatter_(input: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    if source is input:
        raise UnsupportedOpError("masked_scatter_ of a tensor into itself: .clone() the source")
    return assigned(input, "masked_scatter_", lambda: masked_scatter(input, mask, source))

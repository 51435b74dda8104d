"""x[...] and x[...] = v: slices, integers, masks and tensors of indices, which may be sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch.fallback import fall_back
from ...dispatch.follow import PART, follow, hides
from ...dispatch.promote import adopt, adopt_rows
from ...dispatch.writes import check_writable, refuse_overlap, slice_of
from ...errors import UnsupportedOpError
from ...registry import rule, takes_plain
from ...spec import Dim, Spec, axes_in, whole_dims
from ...tensor import ShardTensor, wrap
from ...tensor.apart import alike
from ...tensor.redistribute import fit, reduced, to_dims
from ..fourier.modes import written, zeros
from ..in_place import assigned
from ..nodes import rows_written
from ..operands import checked_dim, cut_axes, dims_of, in_order, lifted, summed
from ..pointwise import align, dims_for, function_rule
from ..rows import covering, normal, read, write
from ..views.shape import permuted
from ..views.slices import selected, sliced, span
from .basic import basic, hashable, is_several
from .masks import is_mask, mask_put, masked, places, without_lead


def spelled(index: Any, ndim: int) -> list[Any] | None:
    """The index as one entry per dim and None, the ellipsis spelled out; None if it cannot be."""
    if type(index) is slice and ndim:
        return [index] + [slice(None)] * (ndim - 1)
    entries = [_tensor(e) for e in (index if is_several(index) else (index,))]
    if any(isinstance(e, bool) or (is_mask(e) and e.ndim == 0) for e in entries):
        return None
    used = sum(e.ndim if is_mask(e) else 1 for e in entries if e is not None and e is not Ellipsis)
    where = next((i for i, e in enumerate(entries) if e is Ellipsis), len(entries))
    if used > ndim:
        raise IndexError(f"too many indices for tensor of dimension {ndim}")
    after = [e for e in entries[where + 1 :] if e is not Ellipsis]
    if len(after) < len(entries[where + 1 :]) and used < ndim:
        # for torch each further ellipsis stands for as many dims again
        last = max(i for i, e in enumerate(entries) if e is Ellipsis)
        if any(e is not None for e in entries[last + 1 :]):
            raise IndexError(f"too many indices for tensor of dimension {ndim}")
    spelled = entries[:where] + [slice(None)] * (ndim - used) + after
    return [int(e) if isinstance(e, Tensor) and e.ndim == 0 else e for e in spelled]


def _tensor(e: Any) -> Any:
    """An entry; a list or an array of numbers as a tensor."""
    if isinstance(e, list | tuple | range) or (
        hasattr(e, "__array__") and not isinstance(e, Tensor)
    ):
        e = torch.as_tensor(e)
        e = e.long() if not e.numel() and not is_mask(e) else e
    if isinstance(e, Tensor) and not is_mask(e) and (e.is_floating_point() or e.is_complex()):
        raise IndexError("tensors used as indices must be long, int, byte or bool tensors")
    return e.bool() if isinstance(e, Tensor) and e.dtype is torch.uint8 else e


def _basic(x: ShardTensor, entries: list[Any]) -> tuple[ShardTensor, dict[int, Tensor]]:
    """Slices, integers and None applied; what remains: {dim of the result: tensor}."""
    d, rest = 0, {}
    passed = []
    for e in entries:
        if e is None:
            x = wrap(x._local.unsqueeze(d), x._spec.insert(d, Dim(1)))
            d += 1
        elif isinstance(e, slice):
            step = 1 if e.step is None else int(e.step)
            if e != slice(None):
                x = sliced(x, d, *span(e.start, e.stop, step, x.shape[d]), step)
            d += 1
        elif isinstance(e, Tensor):
            rest[d] = e
            d += e.ndim if is_mask(e) else 1
        else:
            x = selected(x, d, e.__index__())
            passed.append(x._local)
    if len(passed) > 1:
        # a row of a row is written back to that one first
        x._passed = passed
    return x, rest


_ALL = slice(None)


@function_rule("getitem")
def getitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, index = args
    if index.__class__ is slice and index == _ALL and isinstance(x, ShardTensor) and x._spec.dims:
        # another tensor, which keeps its shape when x.t_() changes that of x
        return wrap(x._local[...], x._spec, x._strides)
    key = hashable(index) if isinstance(x, ShardTensor) else None
    plan = None if key is None else basic(x._spec, key)
    if plan is not None:
        spec, local, part, own = plan
        if spec is None:
            return wrap(x._local[...], x._spec, x._strides)
        out = wrap(x._local[local], spec)
        if part:
            out._slice = slice_of(x, part) if own else (None, spec, part)
        return out
    entries = spelled(index, x.ndim)
    if entries is None:
        return fall_back(func, args, kwargs)
    if not isinstance(x, ShardTensor):
        if not any(isinstance(e, ShardTensor) for e in entries):
            return x[tuple(entries)]
        x = lifted(x, *entries)
    y, rest = _basic(x, entries)
    if rest:
        return picked(y, rest)
    # x[:] is another tensor, which keeps its shape when x.t_() changes that of x
    return y if y is not x else wrap(x._local[...], x._spec, x._strides)


@rule("index", "_unsafe_index")
def index(input: Tensor, indices: Any) -> ShardTensor:
    rest = _at_dims(indices)
    return picked(lifted(input, *rest.values()), rest)


def _at_dims(indices: Any) -> dict[int, Tensor]:
    d, rest = 0, {}
    for e in indices:
        if e is not None:
            rest[d] = _tensor(e)
        d += rest[d].ndim if d in rest and is_mask(rest[d]) else 1
    return rest


# tensors of indices ------------------------------------------------------------------------------


def _numbers(rest: dict[int, Tensor]) -> dict[int, Tensor]:
    """Masks replaced by the places where they are true."""
    found: dict[int, Tensor] = {}
    for d, e in rest.items():
        found |= dict(enumerate(places(e), d)) if is_mask(e) else {d: summed(e)}
    return found


def _front(at: list[int]) -> int:
    """Where the dims of the indices go: to the first indexed dim, if those are adjacent."""
    return at[0] if at == list(range(at[0], at[-1] + 1)) else 0


def _one_row_dim(
    x: ShardTensor, rest: dict[int, Tensor], op: str
) -> tuple[ShardTensor, Tensor, bool | None]:
    """The indexed dims as one, the first; the index into it; `negative` of `read` and `write`."""
    at = sorted(rest)
    y: Any = permuted(x, at + [d for d in range(x.ndim) if d not in rest])
    if len(at) == 1:
        # as it was given: what is found of it is kept, its bounds among that
        return y, rest[at[0]].to(x.device), True
    flat: Any = 0
    for d in at:
        e, n = rest[d], x.shape[d]
        if isinstance(e, ShardTensor):
            e = wrap(normal(e._local, e._spec, n, True, op), e._spec)
        else:
            e = normal(e.to(x.device), Spec(x._spec.mesh, dims_of(e)), n, True, op)
        flat = flat * n + e if d != at[0] else e
    return y.flatten(0, len(at) - 1), flat, None


def picked(x: ShardTensor, rest: dict[int, Tensor]) -> ShardTensor:
    """x at tensors of indices in some dims."""
    x = reduced(x)
    if len(rest) == 1:
        ((d, e),) = rest.items()
        if is_mask(e):
            return masked(x, d, e)
    rest = _numbers(rest)
    at, dims = sorted(rest), x._spec.dims
    front = _front(at)
    if not any(cut_axes(dims[d]) for d in at):
        local_at, lead = _indices(x, rest)
        kept = [n for d, n in enumerate(dims) if d not in rest]
        varying = sorted({*axes_in(dims), *axes_in(lead)})
        (local,) = fit(x._spec.mesh, varying, (x, dims))
        found = alike(not axes_in(lead), torch.ops.aten.index, local, local_at)
        return wrap(found, x._spec.with_dims([*kept[:front], *lead, *kept[front:]]))
    y, flat, negative = _one_row_dim(x, rest, "index")
    out = read(y, flat, negative=negative)
    n = flat.ndim
    order = [*range(n, n + front), *range(n), *range(n + front, out.ndim)]
    return in_order(permuted(out, order)) if front else out


def _indices(
    x: ShardTensor, rest: dict[int, Tensor]
) -> tuple[list[Tensor | None], tuple[Dim, ...]]:
    """(local indices into dims that x has whole, their common dims)."""
    mesh = x._spec.mesh
    tensors = [rest[d] for d in sorted(rest)]
    if any(isinstance(t, ShardTensor) for t in tensors):
        lead = align(*tensors)[0].dims
    else:
        lead = whole_dims(torch.broadcast_shapes(*(t.shape for t in tensors)))
    lead = covering(mesh, lead, (), axes_in(x._spec.dims))
    found = fit(mesh, (), *((t.to(x.device), dims_for(lead, t.shape)) for t in tensors))
    at = dict(zip(sorted(rest), found, strict=True))
    if x.numel() and not (x._local.numel() or any(d.axes for d in lead)):
        # a shard without elements takes any index where others raise
        whole = Spec(mesh, lead)
        for d, e in at.items():
            normal(e, whole, x.shape[d], True, "index")
    return [at.get(d) for d in range(x.ndim)], lead


def put_at(
    x: ShardTensor, rest: dict[int, Tensor], values: Tensor, accumulate: bool = False
) -> ShardTensor:
    """x with values (which broadcast) written at tensors of indices, sharded as x is."""
    x = reduced(x)
    if len(rest) == 1 and not accumulate:
        ((d, e),) = rest.items()
        if is_mask(e):
            return mask_put(x, d, e, values)
    rest = _numbers(rest)
    at, dims = sorted(rest), x._spec.dims
    front = _front(at)
    kept = [n.size for d, n in enumerate(dims) if d not in rest]
    shape = torch.broadcast_shapes(*(t.shape for t in rest.values()))
    values = without_lead(values, len(kept) + len(shape))
    v = values.expand(*kept[:front], *shape, *kept[front:])
    if not any(cut_axes(dims[d]) for d in at):
        local_at, lead = _indices(x, rest)
        split = any(d.axes for d in (*lead, *dims_of(v)[front : front + len(shape)]))
        if not split:
            whole = [n for d, n in enumerate(dims) if d not in rest]
            wanted = [*whole[:front], *lead, *whole[front:]]
            a, b = fit(x._spec.mesh, x._spec.varying, (x, dims), (v, wanted))
            # torch.index_put itself takes no None
            return wrap(alike(True, torch.ops.aten.index_put, a, local_at, b, accumulate), x._spec)
    y, flat, negative = _one_row_dim(x, rest, "index_put")
    v = v.movedim(tuple(range(front, front + len(shape))), tuple(range(len(shape))))
    kernel = None if accumulate else _overwrite
    out: Any = write(y, flat, v, kernel, negative=negative, op="index_put")
    order = at + [d for d in range(x.ndim) if d not in rest]
    out = out.reshape([dims[d].size for d in order]) if len(at) > 1 else out
    back = sorted(range(x.ndim), key=lambda i: order[i])
    return to_dims(permuted(out, back), dims)


def _overwrite(rows: Tensor, at: Tensor, values: Tensor) -> Tensor:
    return rows.index_put((at,), values)


@rule("index_put", "_unsafe_index_put")
def index_put(input: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> ShardTensor:
    rest = _at_dims(indices)
    return put_at(lifted(input, *rest.values(), values), rest, values, accumulate)


@rule("index_put_", "_index_put_impl_")
@takes_plain
def index_put_(
    input: Tensor, indices: Any, values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Tensor:
    return assigned(input, "index_put_", lambda: index_put(input, indices, values, accumulate))


@rule("diagonal_scatter")
def diagonal_scatter(
    input: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> ShardTensor:
    r, c = checked_dim(dim1, input.ndim), checked_dim(dim2, input.ndim)
    n = max(0, min(input.shape[r] + min(0, offset), input.shape[c] - max(0, offset)))
    want = [*(m for d, m in enumerate(input.shape) if d not in (r, c)), n]
    if list(src.shape) != want:
        raise RuntimeError(
            "expected src to have a size equal to the slice of self. src size = "
            f"{list(src.shape)}, slice size = {want}"
        )
    along = torch.arange(n, device=input.device)
    rest = {r: along + max(0, -offset), c: along + max(0, offset)}
    # torch copies it, which casts
    src = src.movedim(-1, _front(sorted(rest))).to(input.dtype)
    return put_at(lifted(input, src), rest, src)


# x[...] = v --------------------------------------------------------------------------------------


@function_rule("setitem")
@takes_plain
def setitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Assignment to slices, rows, masks and tensors of indices."""
    x, index, value = args
    if not isinstance(x, ShardTensor):
        places = spelled(index, x.ndim)
        target = None if places is None else rows_written(x.shape, places, value)
        # adopting counts the references to x: this must be its only name here
        if target is not None:
            adopted = adopt_rows(x, target, indexed=True)
        elif isinstance(value, ShardTensor) and places is not None:
            adopted = adopt(x, places, value._spec, zeros)
            if adopted and written(x, index, value):
                return
        else:
            adopted = False
        if not adopted:
            # a plain tensor is whole on every rank, so it takes whole values
            fall_back(func, args, kwargs)
            return
    check_writable(x, "x[...] = ")
    if not isinstance(value, Tensor):
        # as torch converts a number for this; a fill, an index_put and a new tensor each differ,
        # and in torch 2.15 one element, which takes what the dtype does not hold
        number = x._local.new_empty(2)
        number[...] = value
        value = number[0]
    if isinstance(index, Tensor) and index.dtype is torch.bool and value.numel() == 1:
        if not index.ndim:
            _same_dtype(x, value)
        mask = index.reshape((*index.shape, *[1] * (x.ndim - index.ndim)))
        x.masked_fill_(mask, value.reshape(()))
        return
    entries = spelled(index, x.ndim)
    if entries is None or None in [e for e in entries if not isinstance(e, Tensor)]:
        raise UnsupportedOpError(
            f"x[index] = value with None, True or False in the index of x on {x._spec}: leave None "
            "out, or use torch.where"
        )
    tensors = [e for e in entries if isinstance(e, Tensor)]
    if tensors:
        if len(tensors) == 1 and is_mask(tensors[0]) and value.numel() == 1:
            # a fill, for which torch casts the number
            true = torch.ones((), dtype=torch.bool, device=x.device)
            value = x._local.new_zeros(()).masked_fill(true, value.reshape(()))
        _same_dtype(x, value)
        _set_at(x, entries, value)
    else:
        _set_ranges(x, entries, value)


def _set_ranges(x: ShardTensor, entries: list[Any], value: Tensor) -> None:
    """x[entries] = value for slices and integers."""
    # one row of a sharded dim stays as a range, which leaves other ranks with nothing to write
    ranges, single = [], []
    for e, dim in zip(entries, x._spec.dims, strict=True):
        whole = isinstance(e, slice) or not cut_axes(dim)
        if not whole and not -dim.size <= e < dim.size:
            raise IndexError(f"index {e} is out of bounds for a dimension of size {dim.size}")
        ranges.append(e if whole else slice(e, e + 1 or None))
        if isinstance(e, slice) or not whole:
            single.append(not whole)
    part, _ = _basic(x, ranges)
    if hides(PART, (x,), part):
        # of an expanded tensor, whose rows are written to on some ranks only
        follow(PART, Tensor.__getitem__, (x, tuple(ranges)), {}, part)
    value = without_lead(value, len(single) - sum(single))
    part.copy_(_with_dims_of_one(value, single))


def _same_dtype(x: Tensor, value: Tensor) -> None:
    if value.dtype != x.dtype:
        raise RuntimeError(
            "Index put requires the source and destination dtypes match, got "
            f"{x.dtype} for the destination and {value.dtype} for the source."
        )


def _set_at(x: ShardTensor, entries: list[Any], value: Tensor) -> None:
    """Tensors of indices in what slices and integers leave: computed aside, then copied back."""
    outer: list[Any] = []
    for e in entries:
        outer += [slice(None)] * (e.ndim if is_mask(e) else 1) if isinstance(e, Tensor) else [e]
    part, rest = _basic(x, entries)
    if hides(PART, (x,), part):
        follow(PART, Tensor.__getitem__, (x, tuple(outer)), {}, part)
    refuse_overlap(part, "x[index] = ")
    new = put_at(part, rest, value.to(x.dtype))
    if part._local is x._local:
        x._local.copy_(new._local)
    else:
        x[tuple(outer)] = new


def _with_dims_of_one(value: Tensor, single: list[bool]) -> Tensor:
    """A value for x[i, :, j] shaped for x[i:i+1, :, j:j+1]."""
    missing = sum(not s for s in single) - value.ndim
    for d, is_int in enumerate(single):
        if missing > 0 and not is_int:
            missing -= 1
        elif is_int and missing <= 0:
            lead = sum(1 for s in single[:d]) - (len(single) - value.ndim - sum(single[d:]))
            value = value.unsqueeze(max(0, lead))
    return value

"""gather and scatter: elements along one dim, sharded or not, by global indices."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import _torch, comm
from ...comm import wire
from ...registry import rule
from ...spec import Dim, Spec, axes_in
from ...tensor import wrap
from ...tensor.apart import alike
from ...tensor.redistribute import fit, like, local_of, to_dims
from .. import flat
from ..in_place import in_place
from ..operands import checked_dim, cut_axes, dims_of, in_order, lifted, mesh_of, summed
from ..rows import Kernel, bounded, covering, integers, placed, read, settle, write


def _elements(at: Tensor, index: Spec, shape: Sequence[int], whole: Sequence[bool]) -> Tensor:
    """Rows by index, the first dim of which counts rows, as flat positions of their elements.

    shape: of a row. whole: which of its dims are whole, so that the index counts from their start.
    """
    if at.ndim == 1:
        return at
    own = []
    for i in range(1, at.ndim):
        first = index.offset[i] if whole[i - 1] else 0
        along = torch.arange(first, first + at.shape[i], device=at.device)
        own.append(along.reshape(-1, *[1] * (at.ndim - 1 - i)))
    return at * prod(shape) + flat.positions(own, shape)


def _first(dims: Sequence[Any], d: int) -> tuple[Any, ...]:
    return (dims[d], *dims[:d], *dims[d + 1 :])


def _check_shapes(op: str, d: int, index: Tensor, *others: tuple[Tensor, bool]) -> None:
    for x, every in others:
        if x.ndim != index.ndim:
            raise RuntimeError(
                f"{op}: Index tensor must have the same number of dimensions as the others"
            )
        for i, (n, m) in enumerate(zip(index.shape, x.shape, strict=True)):
            if n > m and (every or i != d) and index.numel():
                raise RuntimeError(
                    f"{op}: Size does not match at dimension {i} expected index "
                    f"{list(index.shape)} to be no larger than {list(x.shape)} apart from "
                    f"dimension {d}"
                )


def _one_index(index: Tensor, d: int) -> bool:
    """Whether the index is a vector along dim d, expanded: then rows move, not elements.

    Strides tell. They might differ from rank to rank, so the ranks agree in one small message.
    """
    rest = [i for i in range(index.ndim) if i != d]
    dims, places = dims_of(index), prod(index.shape[i] for i in rest)
    if _torch.is_tracing() or places == 0 or axes_in([dims[i] for i in rest]):
        return False
    if places == 1:
        return True
    local = local_of(index)
    mine = all(local.stride(i) == 0 or local.shape[i] == 1 for i in rest) or not local.numel()
    if not axes_in(dims):
        return mine
    group = comm.group(mesh_of(index), axes_in(dims))
    return not int(wire.agreed_number(torch.tensor(int(not mine)), local.device, group))


def _along(index: Tensor, d: int) -> Tensor:
    """The vector that an index holds along dim d, the same at all places of the other dims."""
    for i in reversed(range(index.ndim)):
        index = index if i == d else index.select(i, 0)
    return index


@rule("gather")
def gather(input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """Sharded as the index where input has the dim whole, else as input, in the others as both."""
    shape = index.shape
    d = checked_dim(dim, max(1, input.ndim))
    index = integers(index, "gather")
    x, index = summed(input), summed(index)
    if not index.numel():
        return lifted(x.reshape(-1)[:0], index).reshape(shape)
    _check_shapes("gather", d, index, (x, False))
    mesh, dims = mesh_of(x, index), dims_of(x)
    if cut_axes(dims[d]) and _one_index(index, d):
        for i in range(x.ndim):
            if i != d and index.shape[i] != x.shape[i]:
                x = x.narrow(i, 0, index.shape[i])
        picked: Tensor = read(x.movedim(d, 0), _along(index, d), negative=False, op="gather")
        return in_order(picked.movedim(0, d))
    lead = _met(mesh, dims, dims_of(index), d, cut_axes(dims[d]))
    spec = Spec(mesh, lead)
    varying = sorted({*axes_in(dims), *axes_in(lead)})
    local, at = fit(mesh, varying, (x, dims), (index, lead))
    if not cut_axes(dims[d]):
        for i, cut in enumerate(lead):
            if i != d and cut.axes and not dims[i].axes:
                local = local.narrow(i, spec.offset[i], at.shape[i])
        found = alike(not axes_in(lead), local.gather, d, at)
    else:
        at = bounded(index, at, spec, dims[d].size, "gather").movedim(d, 0)
        rows = local.movedim(d, 0)
        n = prod(rows.shape[1:])
        order = Spec(mesh, _first(lead, d))
        free = [not i.axes for i in _first(dims, d)[1:]]
        places = _elements(at, order, rows.shape[1:], free).reshape(-1)
        sizes = [s * n for s in dims[d].sizes]
        found = comm.take(rows.reshape(-1), places, sizes, comm.group(mesh, dims[d].axes))
        found = found.reshape(at.shape).movedim(0, d).contiguous()
    out = wrap(found, spec)
    return out if shape else out.reshape(())


def _met(
    mesh: Any, dims: Sequence[Dim], own: Sequence[Dim], d: int, need: tuple[int, ...]
) -> tuple[Dim, ...]:
    """Dims of an index beside a tensor in `dims`: cut alike in all but dim d.

    By hand: the sizes of both differ, so that an index is cut where the rows of the tensor are.
    """
    taken = axes_in([n for i, n in enumerate(dims) if i != d])
    free = covering(mesh, tuple(own), (), taken)
    lead = [
        n.clipped(0, o.size) if n.axes and i != d else f
        for i, (n, o, f) in enumerate(zip(dims, own, free, strict=True))
    ]
    missing = tuple(a for a in need if a not in axes_in(lead))
    if missing:
        (lead[d],) = covering(mesh, (lead[d],), missing, ())
    return tuple(lead)


def _grown(dim: Dim, n: int) -> Dim:
    """A dim of n rows that is cut as its first ones are."""
    return Dim(n, dim.axes, (*dim.sizes[:-1], dim.sizes[-1] + n - dim.size)) if dim.axes else Dim(n)


def _scattered(
    op: str, input: Tensor, dim: int, index: Tensor, src: Any, kernel: Kernel | None
) -> Tensor:
    """input with elements of src (a tensor, or None: the kernel's value) written along dim."""
    d = checked_dim(dim, max(1, input.ndim))
    index = integers(index, op)
    shape = input.shape
    x, index, src = summed(input), summed(index), summed(src)
    _check_shapes(op, d, index, (x, False), *([(src, True)] if src is not None else []))
    mesh = mesh_of(x, index, src)
    if src is not None:
        if src.dtype != x.dtype:
            raise RuntimeError(f"{op}(): Expected self.dtype to be equal to src.dtype")
        if src.shape != index.shape and index.numel():
            src = src[tuple(slice(n) for n in index.shape)]
        elif not index.numel():
            src = src.reshape(-1)[:0].reshape(index.shape)
    rest = [i for i in range(x.ndim) if i != d]
    if (
        isinstance(src, Tensor)
        and cut_axes(dims_of(x)[d])
        and all(index.shape[i] == x.shape[i] for i in rest)
        and _one_index(index, d)
    ):
        rowwise = None if kernel is None else by_row(kernel)
        full: Tensor = lifted(x, index, src)
        out: Tensor = write(full.movedim(d, 0), _along(index, d), src.movedim(d, 0), rowwise, op=op)
        return in_order(out.movedim(0, d))
    old, own = dims_of(x), dims_of(index)
    given = own if src is None else dims_of(src)
    dims = list(old)
    for i, pair in enumerate(zip(given, own, strict=True)):
        for o in pair:
            if i != d and o.axes and not dims[i].axes and not set(o.axes) & set(axes_in(dims)):
                dims[i] = _grown(o, dims[i].size)
    best = [g if g.axes else o for g, o in zip(given, own, strict=True)]
    if len(set(axes_in(best))) != len(axes_in(best)):
        best = list(given)
    free = [n if i == d else n.whole for i, n in enumerate(best)]
    lead = _met(mesh, dims, free, d, ())
    # only dim d is left to differ
    rows, (along,) = placed(mesh, dims[d], (lead[d],), kernel is None)
    dims[d] = rows
    lead = (*lead[:d], along, *lead[d + 1 :])
    spec, target = Spec(mesh, lead), Spec(mesh, tuple(dims))
    varying = sorted({*axes_in(dims), *axes_in(lead)})
    v, at = fit(mesh, varying, (src, lead), (index, lead))
    at = bounded(index, at, spec, rows.size, op).movedim(d, 0)
    local = like(lifted(x, index, src), target)._local
    moved = local.movedim(d, 0)
    n = prod(moved.shape[1:])
    places = _elements(at, spec.with_dims(_first(lead, d)), moved.shape[1:], [False] * x.ndim)
    values = None if v is None else v.movedim(d, 0).reshape(-1)
    every = Dim(rows.size * n, rows.axes, tuple(s * n for s in rows.sizes))
    new = settle(moved.reshape(-1), places.reshape(-1), values, kernel, every, spec, along.axes)
    made = wrap(new.reshape(moved.shape).movedim(0, d), target)
    found = in_order(to_dims(made, target.replace({d: old[d]}).dims))
    return found if shape else found.reshape(())


def by_row(kernel: Kernel) -> Kernel:
    """A kernel of elements for rows."""

    def rowwise(rows: Tensor, at: Tensor, values: Tensor) -> Tensor:
        return kernel(rows, at.reshape(-1, *[1] * (rows.ndim - 1)).expand(values.shape), values)

    return rowwise


def reduce_kernel(reduce: str, include_self: bool) -> Kernel | None:
    if reduce == "sum" and include_self:
        return None

    def kernel(rows: Tensor, at: Tensor, values: Tensor) -> Tensor:
        if rows.is_complex():
            # which has a gradient only as it writes
            return rows.clone().scatter_reduce_(0, at, values, reduce, include_self=include_self)
        return rows.scatter_reduce(0, at, values, reduce, include_self=include_self)

    return kernel


@rule("scatter")
def scatter(
    input: Tensor,
    dim: int,
    index: Tensor,
    src: Any = None,
    *,
    value: Any = None,
    reduce: str | None = None,
) -> Tensor:
    """Where several elements meet, any of them may win, as in torch."""
    given = value if src is None else src
    if isinstance(given, Tensor):
        if reduce is None:
            return _scattered("scatter", input, dim, index, given, _scatter_kernel)
        if reduce == "add":
            return _scattered("scatter", input, dim, index, given, None)
        if reduce == "multiply":
            return _scattered("scatter", input, dim, index, given, reduce_kernel("prod", True))
        raise RuntimeError("reduce argument must be either add or multiply.")
    options = {} if reduce is None else {"reduce": reduce}
    if index.numel() and input.numel():
        # a value that the dtype cannot hold is an error on ranks without elements, too
        one = torch.zeros(1, dtype=torch.int64, device=input.device)
        torch.zeros(1, dtype=input.dtype, device=input.device).scatter_(0, one, given, **options)

    def fill(rows: Tensor, at: Tensor, values: Tensor | None) -> Tensor:
        return rows.scatter(0, at, given, **options)

    return _scattered("scatter", input, dim, index, None, fill)


def _scatter_kernel(rows: Tensor, at: Tensor, values: Tensor) -> Tensor:
    return rows.scatter(0, at, values)


@rule("scatter_add")
def scatter_add(input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    return _scattered("scatter_add", input, dim, index, src, None)


def scatter_reduce(
    input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    kernel = reduce_kernel(reduce, include_self)
    return _scattered("scatter_reduce", input, dim, index, src, kernel)


for _fn in (scatter, scatter_add, scatter_reduce):
    in_place(_fn, reads=_fn is scatter_reduce)


@rule("scatter_reduce")
def scatter_reduce_apart(
    input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, **options: bool
) -> Tensor:
    if (
        input.is_complex()
        and torch.is_grad_enabled()
        and (input.requires_grad or src.requires_grad)
    ):
        # torch refuses its gradient, but where it writes
        one = torch.zeros(1, dtype=input.dtype, requires_grad=True)
        one.scatter_reduce(0, torch.zeros(1, dtype=torch.int64), one, reduce)
    return scatter_reduce(input, dim, index, src, reduce, **options)

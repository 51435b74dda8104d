"""index_select, index_add, ...: whole rows along one dim; take and put: elements of all dims."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch.trial import few
from ...registry import rule
from ...spec import Spec
from ...tensor import layout, wrap
from ...tensor.redistribute import reduced, to_dims
from ..in_place import in_place
from ..operands import checked_dim, dims_of, in_order, lifted, mesh_of, summed
from ..rows import Kernel, read, write
from .scatter import by_row, reduce_kernel


def _row_index(x: Tensor, dim: int, index: Tensor, op: str) -> tuple[int, Tensor]:
    d = checked_dim(dim, max(1, x.ndim))
    if index.ndim > 1:
        raise IndexError(f"{op}(): Index is supposed to be a vector")
    if index.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{op}(): Expected dtype int32/int64 for index")
    return d, summed(index)


@rule("index_select")
def index_select(input: Tensor, dim: int, index: Tensor) -> Tensor:
    d, index = _row_index(input, dim, index, "index_select")
    x = lifted(summed(input), index)
    out: Tensor = read(x.movedim(d, 0), index, negative=False, op="index_select")
    out = in_order(out.movedim(0, d))
    return out if input.ndim else out.reshape(())


def _rows_written(
    op: str, input: Tensor, dim: int, index: Tensor, source: Tensor | None, kernel: Kernel | None
) -> Tensor:
    d, index = _row_index(input, dim, index, op)
    x, source = summed(input), summed(source)
    if source is not None:
        want = [index.numel() if i == d else n for i, n in enumerate(x.shape)]
        if list(source.shape) != want:
            raise RuntimeError(
                f"{op}(): the source has shape {list(source.shape)}; expected {want} for self of "
                f"shape {list(x.shape)} and {index.numel()} indices"
            )
        if source.dtype != x.dtype:
            raise RuntimeError(f"{op}(): self and source expected to have the same dtype")
        source = source.movedim(d, 0)
    x = lifted(x, index, source)
    out: Tensor = write(x.movedim(d, 0), index, source, kernel, negative=source is None, op=op)
    # torch fills a clone, which lies as it does, and has the others' results rows first
    out = in_order(out.movedim(0, d), x if source is None else None)
    return out if input.ndim else out.reshape(())


def _as_many_dims(op: str, input: Tensor, source: Tensor) -> None:
    if source.ndim != input.ndim:
        raise RuntimeError(
            f"{op}(): a source of {source.ndim} dims, self of {input.ndim}: expected as many"
        )


@rule("index_add")
def index_add(input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1) -> Tensor:
    _as_many_dims("index_add", input, source)
    if alpha != 1 and source.numel():
        _try_factor(input, dim, alpha)
        # as torch converts it, to the dtype of the source
        source = source * torch.full((), alpha, dtype=source.dtype, device=source.device)
    return _rows_written("index_add", input, dim, index, source, None)


def _try_factor(x: Tensor, dim: int, alpha: Any) -> None:
    """Raise what torch raises for a factor that the dtype does not hold."""
    rows = few(x)
    if rows.numel() and -x.ndim <= dim < x.ndim:
        one = torch.zeros(1, dtype=torch.long)
        rows.index_add(dim, one, rows.narrow(dim, 0, 1), alpha=alpha)


@rule("index_copy")
def index_copy(input: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return _rows_written("index_copy", input, dim, index, source, _copy_kernel)


def _copy_kernel(rows: Tensor, at: Tensor, values: Tensor) -> Tensor:
    return rows.index_copy(0, at, values)


@rule("index_fill")
def index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.ndim:
            raise RuntimeError("index_fill_ only supports a 0-dimensional value tensor")
        return _filled(input, dim, index, value)

    def fill(rows: Tensor, at: Tensor, values: Tensor | None) -> Tensor:
        return rows.index_fill(0, at, value)

    return _rows_written("index_fill", input, dim, index, None, fill)


def _filled(input: Tensor, dim: int, index: Tensor, value: Tensor) -> Tensor:
    """By a mask of rows: the value's gradient counts each row once."""
    d, index = _row_index(input, dim, index, "index_fill")
    x = summed(input)
    mesh, rows = mesh_of(x, index, value), dims_of(x)[d]
    spec = Spec(mesh, (rows,))
    none = wrap(torch.zeros(spec.local_shape, dtype=torch.bool, device=x.device), spec)
    mask = index_fill(none, 0, index, True).reshape(-1, *[1] * (x.ndim - d - 1))
    return torch.where(mask, value.to(x.dtype), x).reshape(input.shape)


@rule("index_reduce")
def index_reduce(
    input: Tensor,
    dim: int,
    index: Tensor,
    source: Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> Tensor:
    if reduce not in ("prod", "mean", "amax", "amin"):
        raise RuntimeError(
            "index_reduce(): Expected reduce to be one of prod, mean, amax or amin but got "
            f"{reduce}."
        )
    _as_many_dims("index_reduce", input, source)
    by_element = reduce_kernel(reduce, include_self)
    assert by_element is not None
    # index_reduce itself fails for one column of halves in torch 2.13
    kernel = by_row(by_element)
    return _rows_written("index_reduce", input, dim, index, source, kernel)


# in the flattened tensor -------------------------------------------------------------------------


def _hold_to_long(op: str, index: Tensor) -> None:
    if index.dtype is not torch.int64:
        raise RuntimeError(f"{op}(): Expected a long tensor for index, but got {index.dtype}")


@rule("take")
def take(input: Tensor, index: Tensor) -> Tensor:
    _hold_to_long("take", index)
    x = reduced(input)
    out = read(x.reshape(-1), summed(index), op="take")
    return out if index.ndim else out.reshape(())


@rule("put")
def put(input: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    _hold_to_long("put", index)
    if index.numel() != source.numel():
        raise IndexError("put_(): Expected source and index to have the same number of elements")
    if input.dtype != source.dtype:
        raise RuntimeError("put_(): self and source expected to have the same dtype")
    x, source = summed(input), summed(source)
    x = lifted(x, index, source)
    kernel = None if accumulate else _copy_kernel
    out: Any = write(
        x.reshape(-1), index.reshape(-1), source.reshape(-1), kernel, negative=True, op="put"
    )
    out = to_dims(out.reshape(x.shape), x._spec.dims).reshape(input.shape)
    order = layout.order(x)
    return layout.as_stored(torch.Tensor.contiguous, out, order) if order else out


for _fn in (index_add, index_copy, index_fill, index_reduce, put):
    in_place(_fn, reads=_fn is index_reduce)

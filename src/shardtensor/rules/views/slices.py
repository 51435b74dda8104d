"""Slices stay where they are; one row of a sharded dim is gathered from its owner."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from ...cache import cached
from ...dispatch.writes import slice_of, stands_for_rows
from ...registry import rule
from ...spec import Dim, Spec
from ...tensor import ShardTensor, recut, wrap
from ...tensor.convert import convert
from ...tensor.recut import lasting
from ...tensor.redistribute import fit, reduced
from ..operands import checked_dim, dims_of, many, mesh_of, whole_in


@cached
def picks(dim: Dim, i: int, start: int, stop: int, step: int = 1) -> tuple[Dim, slice]:
    """Rows start, start + step, ... below stop of a dim: as a dim, and shard i's local rows."""
    count = max(0, -(-(stop - start) // step))
    if not dim.axes:
        return Dim(count), slice(start, start + count * step, step)
    # the number of picked rows before each edge of the shards
    picked = (-((start - dim.edges) // step)).clip(0, count)
    new = Dim(count, dim.axes, np.diff(picked).tolist())
    first = start + picked[i] * step - dim.offsets[i]
    return new, slice(first, first + new.sizes[i] * step, step) if new.sizes[i] else slice(0, 0)


class Rows(NamedTuple):
    """Some rows of one dim of a tensor: their spec, where this rank has them, for `slice_of`."""

    spec: Spec
    local: tuple[slice, ...]
    part: dict[int, tuple[tuple[int, int], int]]


@cached
def _rows(spec: Spec, d: int, start: int, stop: int, step: int = 1) -> Rows:
    new, local = picks(spec.dims[d], spec.index[d], start, stop, step)
    where = (*(slice(None),) * d, local)
    return Rows(spec.replace({d: new}), where, {d: ((start, stop), step)})


def _picked(x: ShardTensor, rows: Rows) -> ShardTensor:
    out = wrap(x._local[rows.local], rows.spec)
    out._slice = slice_of(x, rows.part)
    return out


def sliced(x: ShardTensor, d: int, start: int, stop: int, step: int = 1) -> ShardTensor:
    """Rows start, start + step, ... below stop of dim d: every rank keeps what it has of them."""
    return _picked(x, _rows(x._spec, d, start, stop, step))


@cached
def _of_row(spec: Spec, dim: int, index: int) -> tuple[int, int, Spec]:
    """(the dim, the row, the spec of what it is)."""
    d = checked_dim(dim, len(spec.dims))
    n = spec.dims[d].size
    if not -n <= index < n:
        raise IndexError(f"index {index} is out of bounds for dimension {d} with size {n}")
    return d, index % n, spec.drop([d])


def selected(x: ShardTensor, dim: int, index: int) -> ShardTensor:
    """One row of a dim, alike on all ranks that shard it."""
    spec = x._spec
    d, index, out = _of_row(spec, dim, index)
    if not spec.dims[d].axes:
        return wrap(x._local.select(d, index), out)
    row = _rows(spec, d, index, index + 1)
    # a large one is cut along what is left of it
    there = lasting(row.spec, (d,)) if out.shape.numel() >= recut.WHOLE else row.spec
    there = there.whole_in([d])
    rows = convert(x._local[row.local], row.spec, there)
    picked = rows.select(d, 0)
    if spec.dims[d].is_cut:
        own = row.local[d]

        def write(base: Tensor, rows: Tensor) -> None:
            part = base.narrow(d, own.start, own.stop - own.start)
            part.copy_(convert(rows, there, row.spec))

        piece = stands_for_rows(rows, x, "select", write, {d: (index, index + 1)})
        if piece is not None:
            piece.follow(picked)
    return wrap(picked, there.drop([d]))


def span(start: Any, stop: Any, step: int, n: int) -> tuple[int, int]:
    """The first row and the end of a slice, as torch clips them."""
    if step < 1:
        raise ValueError("step must be greater than zero")
    first, last, _ = slice(_int(start), _int(stop), step).indices(n)
    return first, max(first, last)


def _int(x: Any) -> int | None:
    return None if x is None else int(x)


@rule("select")
def select(input: ShardTensor, dim: int, index: int) -> ShardTensor:
    return selected(input, operator.index(dim), int(index))


@rule("slice")
def slice_(
    input: ShardTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> ShardTensor:
    d = checked_dim(dim, input.ndim)
    return sliced(input, d, *span(start, end, step, input.shape[d]), step)


@rule("narrow")
def narrow(input: Tensor, dim: int, start: Any, length: int) -> Tensor:
    if isinstance(start, Tensor):
        inexact = start.is_floating_point() or start.is_complex() or start.dtype is torch.bool
        if start.ndim or inexact:
            raise RuntimeError("start must be an 0-dim integral Tensor.")
        # by a number, of which strides follow
        return input.narrow(dim, int(start), length)
    first = operator.index(start)
    if not isinstance(input, ShardTensor):
        return input.narrow(dim, first, length)
    dim, length = operator.index(dim), operator.index(length)
    return _picked(input, _narrowed(input._spec, dim, first, length))


@cached
def _narrowed(spec: Spec, dim: int, first: int, length: int) -> Rows:
    d = checked_dim(dim, len(spec.dims))
    n = spec.dims[d].size
    if length < 0:
        raise RuntimeError("narrow(): length must be non-negative.")
    if not -n <= first <= n:
        raise IndexError(
            f"start out of range (expected to be in range of [-{n}, {n}], but got {first})"
        )
    first = first + n if first < 0 else first
    if first + length > n:
        raise RuntimeError(f"start ({first}) + length ({length}) exceeds {n}")
    return _rows(spec, d, first, first + length)


@rule("unbind")
def unbind(input: ShardTensor, dim: int = 0) -> tuple[ShardTensor, ...]:
    d, spec, cut = _unbound(input._spec, operator.index(dim))
    if cut:
        input = whole_in(input, [d], "unbind", True)
        spec = input._spec.drop([d])
    return tuple([wrap(row, spec) for row in input._local.unbind(d)])


@cached
def _unbound(spec: Spec, dim: int) -> tuple[int, Spec, bool]:
    """(the dim, the spec of its rows, whether mesh axes shard it)."""
    d = checked_dim(dim, len(spec.dims))
    return d, spec.drop([d]), bool(spec.dims[d].axes)


@rule("split", "split_with_sizes")
def split(tensor: ShardTensor, *args: Any, **kwargs: Any) -> tuple[ShardTensor, ...]:
    return _parts(tensor, _asked(tensor._spec, *args, **kwargs), torch.split_with_sizes)


def _asked(
    spec: Spec,
    split_size: Any = None,
    dim: int = 0,
    *,
    split_sizes: Any = None,
    split_size_or_sections: Any = None,
) -> Parts:
    given = next(s for s in (split_size, split_sizes, split_size_or_sections) if s is not None)
    sizes = many(given) if isinstance(given, list | tuple) else int(given)
    return _split(spec, operator.index(dim), sizes)


class Parts(NamedTuple):
    """Consecutive rows of a dim: how many this rank has of each part, and their specs."""

    dim: int
    own: list[int]
    specs: tuple[Spec, ...]


@cached
def _split(spec: Spec, dim: int, sizes: int | tuple[int, ...]) -> Parts:
    d = checked_dim(dim, len(spec.dims))
    n = spec.dims[d].size
    sizes = _even(n, sizes) if isinstance(sizes, int) else sizes
    if any(k < 0 for k in sizes):
        raise RuntimeError(
            "split_with_sizes expects split_sizes have only non-negative entries, but got "
            f"split_sizes={list(sizes)}"
        )
    if sum(sizes) != n:
        raise RuntimeError(f"split_with_sizes expects sizes that add up to {n}, not {list(sizes)}")
    own, specs, at = [], [], 0
    for k in sizes:
        new = picks(spec.dims[d], spec.index[d], at, at + k)[0]
        own.append(new.sizes[spec.index[d]] if new.axes else new.size)
        specs.append(spec.replace({d: new}))
        at += k
    return Parts(d, own, tuple(specs))


def _even(n: int, size: int) -> tuple[int, ...]:
    # of no rows torch takes pieces of none
    return tuple([min(size, n - i) for i in range(0, n, size)]) if n else (0,)


def _parts(x: ShardTensor, parts: Parts, cut: Callable[..., Any]) -> tuple[ShardTensor, ...]:
    # one op, as in torch: autograd lets nobody write to views of split
    locals_ = cut(x._local, parts.own, parts.dim)
    return tuple([wrap(local, s) for local, s in zip(locals_, parts.specs, strict=True)])


@rule("chunk")
def chunk(input: ShardTensor, chunks: int, dim: int = 0) -> tuple[ShardTensor, ...]:
    parts = _chunked(input._spec, operator.index(chunks), operator.index(dim))
    return _parts(input, parts, torch.split_with_sizes)


@cached
def _chunked(spec: Spec, chunks: int, dim: int) -> Parts:
    if chunks < 1:
        raise RuntimeError(f"chunk expects `chunks` to be greater than 0, got: {chunks}")
    n = spec.dims[checked_dim(dim, len(spec.dims))].size
    return _split(spec, dim, _even(n, -(-n // chunks)) if n else (0,) * chunks)


@rule("tensor_split")
def tensor_split(
    input: Tensor,
    indices_or_sections: Any = None,
    dim: int = 0,
    *,
    indices: Any = None,
    sections: Any = None,
    tensor_indices_or_sections: Any = None,
) -> Any:
    """At indices, or into a number of sections; either may be a tensor."""
    given = (indices_or_sections, indices, sections, tensor_indices_or_sections)
    at = next(g for g in given if g is not None)
    if isinstance(at, Tensor):
        if at.dtype is not torch.long or at.ndim > 1:
            raise RuntimeError(
                f"tensor_split at {at.dtype} of {at.ndim} dims: expected a long vector"
            )
        # by numbers, of which strides follow
        return torch.tensor_split(input, at.tolist(), dim)
    assert isinstance(input, ShardTensor)
    d = checked_dim(dim, input.ndim)
    n = input.shape[d]
    if isinstance(at, SupportsIndex):
        sections = operator.index(at)
        if sections <= 0:
            raise RuntimeError(f"number of sections must be larger than 0, got {sections}")
        at = [i * (n // sections) + min(i, n % sections) for i in range(1, sections)]
    # slices each, as in torch: unlike those of split, autograd lets them be written to
    ends = zip([0, *at], [*at, n], strict=True)
    return tuple(sliced(input, d, *span(a, b, 1, n)) for a, b in ends)


# the same as copies, which may be written to ------------------------------------------------------


@rule("narrow_copy")
def narrow_copy(input: Tensor, dim: int, start: int, length: int) -> Tensor:
    return narrow(input, dim, start, length).clone(memory_format=torch.contiguous_format)


@rule("unsafe_split", "unsafe_split_with_sizes")
def unsafe_split(tensor: ShardTensor, *args: Any, **kwargs: Any) -> tuple[ShardTensor, ...]:
    return _parts(tensor, _asked(tensor._spec, *args, **kwargs), torch.unsafe_split_with_sizes)


@rule("unsafe_chunk")
def unsafe_chunk(input: ShardTensor, chunks: int, dim: int = 0) -> tuple[ShardTensor, ...]:
    parts = _chunked(input._spec, operator.index(chunks), operator.index(dim))
    return _parts(input, parts, torch.unsafe_split_with_sizes)


# written back ------------------------------------------------------------------------------------


@rule("slice_scatter")
def slice_scatter(
    input: Tensor, src: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> ShardTensor:
    """Every rank writes the rows that it holds; those of src move to where they belong."""
    d = checked_dim(dim, input.ndim)
    return _written(input, src, d, *span(start, end, step, input.shape[d]), step)


@rule("select_scatter")
def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> ShardTensor:
    d = checked_dim(dim, input.ndim)
    n = input.shape[d]
    if not -n <= index < n:
        raise IndexError(f"index {index} is out of bounds for dimension {d} with size {n}")
    return _written(input, src.unsqueeze(d), d, index % n, index % n + 1, 1)


def _written(x: Tensor, src: Tensor, d: int, start: int, stop: int, step: int) -> ShardTensor:
    mesh = mesh_of(x, src)
    x, src = map(reduced, (x, src))
    # a plain target lies as its largest operand
    dims = list(dims_of(x if isinstance(x, ShardTensor) else src))
    if not isinstance(x, ShardTensor):
        dims[d] = Dim(x.shape[d])
    spec = Spec(mesh, tuple(dims))
    new, local = picks(dims[d], spec.index[d], start, stop, step)
    wanted = (*dims[:d], new, *dims[d + 1 :])
    if src.shape != tuple(n.size for n in wanted):
        raise RuntimeError(
            "expected src to have a size equal to the slice of self. src size = "
            f"{list(src.shape)}, slice size = {[n.size for n in wanted]}"
        )
    a, b = fit(mesh, spec.varying, (x, dims), (src, wanted))
    # a shard of a plain target is a view of it, whose strides torch would keep
    a = a if isinstance(x, ShardTensor) else a.contiguous()
    return wrap(a.slice_scatter(b, d, local.start, local.stop, local.step or 1), spec)

"""Slices stay where they are; one row of a sharded dim is gathered from its owner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import comm
from ..cache import cached
from ..dispatch.writes import slice_of, stands_for_rows
from ..registry import rule
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import fit, reduced
from .rows import dims_of, mesh_of
from .shape import _index, whole_in


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


def sliced(x: ShardTensor, d: int, start: int, stop: int, step: int = 1) -> ShardTensor:
    """Rows start, start + step, ... below stop of dim d: every rank keeps what it has of them."""
    spec = x._spec
    new, local = picks(spec.dims[d], spec.index[d], start, stop, step)
    out = wrap(x._local[(slice(None),) * d + (local,)], spec.replace({d: new}))
    out._slice = slice_of(x, d, start, stop, step)
    return out


def selected(x: ShardTensor, d: int, index: int) -> ShardTensor:
    """One row of dim d, alike on all ranks that shard it."""
    n = x.shape[d]
    if not -n <= index < n:
        raise IndexError(f"index {index} is out of bounds for dimension {d} with size {n}")
    index %= n
    spec = x._spec
    out, dim = spec.drop([d]), spec.dims[d]
    if not dim.axes:
        return wrap(x._local.select(d, index), out)
    row = sliced(x, d, index, index + 1)
    sizes, group = row._spec.dims[d].sizes, comm.along(spec, d)
    rows = comm.gather(row._local, d, sizes, group)
    picked = rows.select(d, 0)
    if len(sizes) > 1:
        own = picks(dim, spec.index[d], index, index + 1)[1]

        def write(base: Tensor, rows: Tensor) -> None:
            part = base.narrow(d, own.start, own.stop - own.start)
            part.copy_(comm.split(rows, d, sizes, group))

        piece = stands_for_rows(rows, x, "select", write, {d: (index, index + 1)})
        if piece is not None:
            piece.follow(picked)
    return wrap(picked, out)


def span(start: Any, stop: Any, step: int, n: int) -> tuple[int, int]:
    """The first row and the end of a slice, as torch clips them."""
    first, last, _ = slice(_int(start), _int(stop), step).indices(n)
    return first, max(first, last)


def _int(x: Any) -> int | None:
    return None if x is None else int(x)


@rule("select")
def select(input: ShardTensor, dim: int, index: int) -> ShardTensor:
    return selected(input, _index(dim, input.ndim), int(index))


@rule("slice")
def slice_(
    input: ShardTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> ShardTensor:
    d = _index(dim, input.ndim)
    return sliced(input, d, *span(start, end, step, input.shape[d]), step)


@rule("narrow")
def narrow(input: Tensor, dim: int, start: Any, length: int) -> Tensor:
    first = int(start)
    if not isinstance(input, ShardTensor):
        return input.narrow(dim, first, length)
    d = _index(dim, input.ndim)
    n = input.shape[d]
    if length < 0:
        raise RuntimeError("narrow(): length must be non-negative.")
    if not -n <= first <= n:
        raise IndexError(
            f"start out of range (expected to be in range of [-{n}, {n}], but got {first})"
        )
    first = first + n if first < 0 else first
    if first + length > n:
        raise RuntimeError(f"start ({first}) + length ({length}) exceeds {n}")
    return sliced(input, d, first, first + length)


@rule("unbind")
def unbind(input: ShardTensor, dim: int = 0) -> tuple[ShardTensor, ...]:
    d = _index(dim, input.ndim)
    x = whole_in(input, [d], "unbind")
    spec = x._spec.drop([d])
    return tuple(wrap(row, spec) for row in x._local.unbind(d))


@rule("split", "split_with_sizes")
def split(
    tensor: ShardTensor,
    split_size: Any = None,
    dim: int = 0,
    *,
    split_sizes: Any = None,
    split_size_or_sections: Any = None,
) -> tuple[ShardTensor, ...]:
    given = next(s for s in (split_size, split_sizes, split_size_or_sections) if s is not None)
    d = _index(dim, tensor.ndim)
    n = tensor.shape[d]
    sizes = list(given) if isinstance(given, list | tuple) else _even(n, int(given))
    if sum(sizes) != n:
        raise RuntimeError(f"split_with_sizes expects sizes that add up to {n}, not {sizes}")
    return _parts(tensor, d, sizes)


def _even(n: int, size: int) -> list[int]:
    return [min(size, n - i) for i in range(0, n, size)] or [0]


def _parts(x: ShardTensor, d: int, sizes: Sequence[int]) -> tuple[ShardTensor, ...]:
    spec = x._spec
    new, at = [], 0
    for n in sizes:
        new.append(picks(spec.dims[d], spec.index[d], at, at + n)[0])
        at += n
    own = [dim.sizes[spec.index[d]] if dim.axes else dim.size for dim in new]
    # one op, as in torch, whose views autograd does not let be written to
    locals_ = x._local.split_with_sizes(own, d)
    return tuple(
        wrap(local, spec.replace({d: dim})) for local, dim in zip(locals_, new, strict=True)
    )


@rule("chunk")
def chunk(input: ShardTensor, chunks: int, dim: int = 0) -> tuple[ShardTensor, ...]:
    d = _index(dim, input.ndim)
    n = input.shape[d]
    if n == 0:
        return _parts(input, d, [0] * chunks)
    return _parts(input, d, _even(n, -(-n // chunks)))


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
    at = at.tolist() if isinstance(at, Tensor) else at
    if not isinstance(input, ShardTensor):
        return torch.tensor_split(input, at, dim)
    d = _index(dim, input.ndim)
    n = input.shape[d]
    if not isinstance(at, int):
        ends = zip([0, *at], [*at, n], strict=True)
        return tuple(sliced(input, d, *span(a, b, 1, n)) for a, b in ends)
    if at <= 0:
        raise RuntimeError(f"number of sections must be larger than 0, got {at}")
    return _parts(input, d, [n // at + (i < n % at) for i in range(at)])


# the same as copies, which may be written to ------------------------------------------------------


@rule("narrow_copy")
def narrow_copy(input: Tensor, dim: int, start: int, length: int) -> Tensor:
    return narrow(input, dim, start, length).clone()


@rule("unsafe_split", "unsafe_split_with_sizes")
def unsafe_split(tensor: ShardTensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return split(tensor, *args, **kwargs)


@rule("unsafe_chunk")
def unsafe_chunk(input: ShardTensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    return chunk(input, chunks, dim)


# written back ------------------------------------------------------------------------------------


@rule("slice_scatter")
def slice_scatter(
    input: Tensor, src: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> ShardTensor:
    """Every rank writes the rows that it holds; those of src move to where they belong."""
    d = _index(dim, input.ndim)
    return _written(input, src, d, *span(start, end, step, input.shape[d]), step)


@rule("select_scatter")
def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> ShardTensor:
    d = _index(dim, input.ndim)
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
    return wrap(a.slice_scatter(b, d, local.start, local.stop, local.step or 1), spec)

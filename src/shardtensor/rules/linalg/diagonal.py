"""Triangles and diagonals: on a block of a matrix the same diagonal has another number."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import comm
from ...dispatch.trial import tried
from ...dispatch.writes import check_writable, stands_for_view
from ...registry import rule
from ...spec import Dim, Spec
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import reduced
from ..operands import checked_dim, in_order
from ..views.shape import permuted


def _shift(spec: Spec, rows: int, columns: int) -> int:
    """What a global diagonal's number is greater by on this rank's block."""
    return spec.offset[rows] - spec.offset[columns]


def _matrix(x: ShardTensor, name: str) -> None:
    if x.ndim < 2:
        raise RuntimeError(f"{name}: input tensor must have at least 2 dimensions")


def _define_triangle(name: str) -> None:
    in_place = name + "_"

    @rule(name)
    def triangle(input: ShardTensor, diagonal: int = 0) -> ShardTensor:
        _matrix(input, name)
        x = reduced(input)
        return wrap(getattr(x._local, name)(diagonal + _shift(x._spec, -2, -1)), x._spec)

    @rule(in_place)
    def triangle_(input: ShardTensor, diagonal: int = 0) -> ShardTensor:
        _matrix(input, in_place)
        check_writable(input, in_place)
        getattr(input._local, in_place)(diagonal + _shift(input._spec, -2, -1))
        return input


_define_triangle("tril")
_define_triangle("triu")


# diagonals of matrices ---------------------------------------------------------------------------


@rule("diagonal")
def diagonal(
    input: ShardTensor, offset: int = 0, dim1: int = 0, dim2: int = 1, **names: Any
) -> ShardTensor:
    """A view where at most one of the dims is sharded; else each rank's part is added up."""
    x = reduced(input)
    r, c = checked_dim(dim1, x.ndim), checked_dim(dim2, x.ndim)
    if r == c:
        raise RuntimeError(f"diagonal dimensions cannot be identical {dim1}, {dim2}")
    spec = x._spec
    first, start = max(0, -offset), max(0, offset)
    length = max(0, min(x.shape[r] - first, x.shape[c] - start))
    # the diagonal cut where rows are, and where columns are
    rows, columns = (
        spec.drop((r, c)).insert(x.ndim - 2, spec.dims[d].clipped(at, at + length))
        for d, at in ((r, first), (c, start))
    )
    local = x._local.diagonal(offset + _shift(spec, r, c), r, c)
    if not (rows.dims[-1].axes and columns.dims[-1].axes):
        return wrap(local, rows if rows.dims[-1].axes else columns)
    # which of my rows' entries lie in my columns
    (a, b), (p, q) = rows.spans[-1], columns.spans[-1]
    low, high = max(a, p), min(b, q)
    before = low - a if low < high else b - a
    local = F.pad(local, (before, b - a - before - local.shape[-1]))
    local = comm.reduce(local, comm.along(spec, c))
    return wrap(stands_for_view(local, x._local, "diagonal"), rows)


@rule("linalg_diagonal")
def linalg_diagonal(A: Tensor, *, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    return torch.diagonal(A, offset, dim1, dim2)


@rule("diag_embed")
def diag_embed(input: ShardTensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> ShardTensor:
    """Sharded entries make sharded rows; nothing is sent."""
    x = reduced(input)
    n = x.ndim + 1
    r, c = checked_dim(dim1, n), checked_dim(dim2, n)
    if r == c:
        raise RuntimeError(f"diagonal dimensions cannot be identical {dim1}, {dim2}")
    if r > c:
        # the diagonal above is below where rows and columns change places
        r, c, offset = c, r, -offset
    spec, entries = x._spec, x._spec.dims[-1]
    size = entries.size + abs(offset)
    rows = entries.cut_at([0, *(o + max(0, -offset) for o in entries.offsets[1:-1]), size])
    made = spec.replace({-1: rows}).insert(n - 1, Dim(size))
    blank = x._local.new_zeros(made.local_shape)
    local = torch.diagonal_scatter(blank, x._local, offset + made.offset[-2], -2, -1)
    order = list(range(n - 2))
    order.insert(r, n - 2)
    order.insert(c, n - 1)
    return in_order(permuted(wrap(local, made), order))


@rule("diag")
def diag(input: ShardTensor, diagonal: int = 0) -> Tensor:
    if input.ndim not in (1, 2):
        raise RuntimeError(f"diag(): Supports 1D or 2D tensors. Got {input.ndim}D")
    if input.ndim == 1:
        return torch.diag_embed(input, diagonal)
    return torch.diagonal(input, diagonal).clone()


@rule("diagflat")
def diagflat(input: Tensor, offset: int = 0) -> Tensor:
    return torch.diag_embed(input.reshape(-1), offset)


@rule("fill_diagonal_")
def fill_diagonal_(input: ShardTensor, fill_value: float, wrap: bool = False) -> ShardTensor:
    """Of two dims, with `wrap` again and again below; of more the elements of equal indices."""
    if input.ndim < 2:
        raise RuntimeError("dimensions must larger than 1")
    if input.ndim > 2 and len(set(input.shape)) > 1:
        raise RuntimeError("all dimensions of input must be of equal length")
    check_writable(input, "fill_diagonal_")
    local, n = input._local, input.shape[1]
    at = [torch.arange(*span, device=local.device) for span in input._spec.spans]
    first, *others = (i.view(-1, *[1] * (input.ndim - 1 - d)) for d, i in enumerate(at))
    if wrap and input.ndim == 2:
        mask = (first * n + others[0]) % (n + 1) == 0
    else:
        mask = torch.ones_like(first, dtype=torch.bool)
        for other in others:
            mask = mask & (first == other)
    local.masked_fill_(mask, fill_value)
    return input


@rule("trace")
def trace(input: ShardTensor) -> Tensor:
    if input.ndim != 2:
        raise RuntimeError(f"trace: expected a matrix, but got tensor with dim {input.ndim}")
    if input.dtype is torch.bool:
        tried(torch.trace, input)
    return torch.diagonal(input).sum()


@rule("block_diag")
def block_diag(tensors: Any) -> Tensor:
    """Rows of the blocks one after the other, each with zeros on both sides."""
    blocks = [t.reshape(1, -1) if t.ndim < 2 else t for t in tensors]
    if any(t.ndim > 2 for t in blocks):
        raise RuntimeError("torch.block_diag: Input tensors must have 2 or fewer dimensions")
    width = sum(t.shape[1] for t in blocks)
    padded, at = [], 0
    for t in blocks:
        padded.append(F.pad(t, (at, width - at - t.shape[1])))
        at += t.shape[1]
    return torch.cat(padded)

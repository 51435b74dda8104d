"""Views in place (`x.t_()`): the tensor itself takes the shape, its memory stays."""

from __future__ import annotations

from typing import Any

import torch

from ..aliases import family_of
from ..errors import UnsupportedOpError
from ..registry import rule
from ..spec import Dim, Spec
from ..tensor import ShardTensor
from .shape import _index, many, squeeze


def _with_dims(x: ShardTensor, dims: tuple[Dim, ...]) -> ShardTensor:
    x._spec = Spec(x._spec.mesh, dims, x._spec.partial)
    family = family_of(x._local)
    for cdata, piece in list(family.pieces.items()) if family is not None else ():
        # torch counts it as a write
        if cdata != x._local.untyped_storage()._cdata:
            piece.move_version()
    return x


@rule("transpose_", "swapaxes_", "swapdims_")
def transpose_(input: ShardTensor, dim0: int, dim1: int) -> ShardTensor:
    if not input.ndim:
        return input
    a, b = _index(dim0, input.ndim), _index(dim1, input.ndim)
    dims = list(input._spec.dims)
    dims[a], dims[b] = dims[b], dims[a]
    input._local.transpose_(a, b)
    return _with_dims(input, tuple(dims))


@rule("t_")
def t_(input: ShardTensor) -> ShardTensor:
    if input.ndim > 2:
        raise RuntimeError(f"t_() expects a tensor with <= 2 dimensions, but self is {input.ndim}D")
    return transpose_(input, 0, 1) if input.ndim == 2 else input


@rule("unsqueeze_")
def unsqueeze_(input: ShardTensor, dim: int) -> ShardTensor:
    d = _index(dim, input.ndim + 1)
    input._local.unsqueeze_(d)
    return _with_dims(input, (*input._spec.dims[:d], Dim(1), *input._spec.dims[d:]))


@rule("squeeze_")
def squeeze_(input: ShardTensor, dim: Any = None) -> ShardTensor:
    n = input.ndim
    chosen = range(n) if dim is None else [_index(d, n) for d in many(dim) if n]
    gone = [d for d in chosen if input.shape[d] == 1]
    if not any(input._spec.dims[d].axes for d in gone):
        input._local.squeeze_(tuple(gone))
        return _with_dims(input, tuple(d for i, d in enumerate(input._spec.dims) if i not in gone))
    if input.is_leaf and input.requires_grad:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a leaf Variable that requires grad is being used in an in-place operation."
            )
        raise UnsupportedOpError(
            f"squeeze_ of a leaf on {input._spec}, cut along that dim: use squeeze"
        )
    new = squeeze(input, dim)
    input._local, input._spec = new._local, new._spec
    return input

"""Views in place (`x.t_()`): the tensor itself takes the shape, its memory stays."""

from __future__ import annotations

from typing import Any

import torch

from ...dispatch.writes import reshaped_in_place
from ...errors import UnsupportedOpError
from ...registry import rule
from ...spec import Dim, Spec
from ...tensor import ShardTensor, layout
from ..operands import checked_dim, many
from .shape import squeeze


def _refuse_hidden(x: ShardTensor, op: str) -> None:
    """Raise for another shape of a result behind the back of its gradient."""
    if x.requires_grad and not (x.is_leaf or torch.is_grad_enabled()):
        # torch finds gradients of another shape in backward, or takes them where sizes agree
        raise UnsupportedOpError(
            f"{op} under no_grad on {x._spec}, which has a gradient: use {op[:-1]}, or detach first"
        )


def _changed(x: ShardTensor, op: str, args: tuple[Any, ...], dims: tuple[Dim, ...]) -> ShardTensor:
    """x after op(its local tensor, *args), which leaves it in these dims."""
    _refuse_hidden(x, op)
    spec = Spec(x._spec.mesh, dims, x._spec.partial)
    lies = None
    if x._strides is not None or x._spec.thin:
        lies = layout.after(x, lambda whole: getattr(whole, op)(*args))
    if x._local.grad_fn is None:
        getattr(x._local, op)(*args)
    else:
        # others that are views of it may be taken anew, of the shape that they know
        torch.autograd.graph.increment_version(x._local)
        x._local = getattr(x._local, op[:-1])(*args)
    # torch refuses leaves, which stay as they were
    if lies is not None:
        x._strides = layout.Strides.of(spec.shape, lies)
    x._spec, x._slice = spec, None
    reshaped_in_place(x, op)
    return x


@rule("transpose_", "swapaxes_", "swapdims_")
def transpose_(input: ShardTensor, dim0: int, dim1: int) -> ShardTensor:
    if not input.ndim:
        return input
    a, b = checked_dim(dim0, input.ndim), checked_dim(dim1, input.ndim)
    dims = list(input._spec.dims)
    dims[a], dims[b] = dims[b], dims[a]
    return _changed(input, "transpose_", (a, b), tuple(dims))


@rule("t_")
def t_(input: ShardTensor) -> ShardTensor:
    if input.ndim > 2:
        raise RuntimeError(f"t_() expects a tensor with <= 2 dimensions, but self is {input.ndim}D")
    if input.ndim < 2:
        return _changed(input, "t_", (), input._spec.dims)
    return transpose_(input, 0, 1)


@rule("unsqueeze_")
def unsqueeze_(input: ShardTensor, dim: int) -> ShardTensor:
    d = checked_dim(dim, input.ndim + 1)
    dims = input._spec.insert(d, Dim(1)).dims
    return _changed(input, "unsqueeze_", (d,), dims)


@rule("squeeze_")
def squeeze_(input: ShardTensor, dim: Any = None) -> ShardTensor:
    n = input.ndim
    chosen = range(n) if dim is None else [checked_dim(d, n) for d in many(dim) if n]
    gone = tuple(d for d in chosen if input.shape[d] == 1)
    if not any(input._spec.dims[d].axes for d in gone):
        dims = input._spec.drop(gone).dims
        return _changed(input, "squeeze_", (gone,), dims)
    if input.is_leaf and input.requires_grad:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a leaf Variable that requires grad is being used in an in-place operation."
            )
        raise UnsupportedOpError(
            f"squeeze_ of a leaf on {input._spec}, cut along that dim: use squeeze"
        )
    _refuse_hidden(input, "squeeze_")
    found = layout.after(input, lambda whole: whole.squeeze_(gone))
    new = squeeze(input, dim)
    input._strides = layout.Strides.of(new.shape, found)
    input._local, input._spec, input._slice = new._local, new._spec, None
    return input

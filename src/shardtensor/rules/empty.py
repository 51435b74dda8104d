"""A shard without elements: stock ops run on one row in place of none, which is then cut off.

So a rank without rows records the graph that the others record. Torch's own shortcuts for empty
tensors leave out parts of it, and with them the messages of backward and of second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch


def with_one(local: Tensor, dims: Sequence[int], value: Any) -> Tensor:
    """The local tensor; where it is empty along dims, one row of value, so that it reduces."""
    shape = list(local.shape)
    for d in dims:
        shape[d] = shape[d] or 1
    if shape == list(local.shape):
        return local
    return in_place_of(local, local.new_full(shape, value))


def some(x: Tensor) -> Tensor:
    """x; where it has no elements, one row in place of none.

    Its numbers are without ties, zeros, singular matrices and equal eigenvalues; an integer is 1,
    as LAPACK counts.
    """
    if x.numel():
        return x
    shape = torch.Size([n or 1 for n in x.shape])
    if not (x.is_floating_point() or x.is_complex()):
        return x.new_ones(shape)
    rows = torch.linspace(1, 2, shape.numel(), dtype=torch.float64, device=x.device).reshape(shape)
    if x.ndim > 1:
        most = 4 * max(shape[-2:])
        apart = torch.arange(1, shape[-1] + 1, dtype=rows.dtype, device=x.device)
        rows = rows + most * apart * torch.eye(*shape[-2:], dtype=rows.dtype, device=x.device)
    return in_place_of(x, rows.to(x.dtype))


def in_place_of(x: Tensor, rows: Tensor) -> Tensor:
    """The rows, in the graph in the place of x, which has no elements."""
    pairs = zip(reversed(x.shape), reversed(rows.shape), strict=True)
    ahead = [n for have, want in pairs for n in (0, want - have)]
    if _torch.under_modes() or _torch.transforming() or not x.requires_grad:
        # the gradient of a concatenation drops the graph of what has no elements
        return torch.constant_pad_nd(x, ahead) + rows
    return _Rows.apply(x, rows, ahead)


class _Rows(_torch.Function):
    """Rows of one version with x: backward that saved them raises where x was written to, too.

    As it does on ranks that have elements.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, ahead: list[int]) -> Tensor:
        ctx.materialize_grads = False
        ctx.ahead = ahead
        alike = x.detach()
        alike.data = rows
        return alike

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None, None]:
        gx = None if g is None else torch.constant_pad_nd(g, [-n for n in ctx.ahead])
        return gx, None, None


def stock(fn: Callable[..., Any], shape: Sequence[int], *xs: Tensor | None) -> Any:
    """fn(*xs), a tensor of this shape or several, of local tensors some of which may be empty."""
    for x in xs:
        if x is not None and not x.numel():
            break
    else:
        return fn(*xs)
    out = fn(*(x if x is None else some(x) for x in xs))
    return cut(out, shape) if isinstance(out, Tensor) else tuple(cut(o, shape) for o in out)


def through(out: Tensor, x: Tensor, d: int) -> Tensor:
    """out, a product of x along d, with a gradient that depends on x for a single row, too.

    Torch's shortcut for one row leaves the factor out of the gradient, and with it the messages of
    second derivatives that ranks with more rows send.
    """
    if x.shape[d] != 1 or not _torch.differentiated(out):
        return out
    # all of it is masked, so that neither its values nor its gradients count
    every = torch.ones_like(x, dtype=torch.bool)
    return torch.where(every, out, x.masked_fill(every, 1).exp().to(out.dtype))


def joined(parts: Sequence[Tensor], d: int) -> Tensor:
    """torch.cat; of vectors it would drop the graph of those without elements."""
    if parts[0].ndim > 1:
        return torch.cat(list(parts), d)
    return torch.cat([p[None] for p in parts], 1)[0]


def cut(out: Tensor, shape: Sequence[int]) -> Tensor:
    """The first rows of out in each dim, as many as shape says."""
    for d, n in enumerate(shape):
        out = out.narrow(d, 0, n) if out.shape[d] > n else out
    return out

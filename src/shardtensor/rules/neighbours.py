"""Ops on neighbours along one dim: differences, local response normalization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import rule
from ..tensor import ShardTensor, layout, wrap
from .empty import stock
from .operands import checked_dim, lifted
from .sliding import sliding
from .windows import Stencil, checked


@rule("diff")
def diff(
    input: Tensor,
    n: int = 1,
    dim: int = -1,
    prepend: Tensor | None = None,
    append: Tensor | None = None,
) -> ShardTensor:
    """The n-th differences, in one exchange however large n is."""
    given = [t for t in (prepend, append) if t is not None]
    if given or input.ndim == 0 or n < 1:
        # raises what torch raises
        meta = [t if t is None else torch.empty(t.shape, device="meta") for t in (prepend, append)]
        torch.diff(torch.empty(input.shape, device="meta"), n, dim, *meta)
    x = lifted(input, prepend, append)
    d = checked_dim(dim, x.ndim)
    if n == 0:
        return wrap(x._local.clone(), x._spec)
    if given:
        x = lifted(torch.cat([t for t in (prepend, x, append) if t is not None], dim))
    stored = layout.order(x)
    if stored:
        return layout.as_stored(lambda y: diff(y, n, stored.index(d)), x, stored)
    order = min(n, x.shape[d])
    return sliding(x, {d: Stencil(order + 1)}, lambda rows: torch.diff(rows, order, d))


@rule(F.local_response_norm)
def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> ShardTensor:
    """Each element by its neighbours along channels."""
    x = lifted(input)
    if x.ndim > 2 and not x.numel():
        return x
    before, after = size // 2, (size - 1) // 2

    def norm(rows: Tensor, padding: Sequence[int] = (0,)) -> Tensor:
        y = stock(lambda z: F.local_response_norm(z, size, alpha, beta, k), rows.shape, rows)
        # torch pads by itself: what it makes of rows that were fetched belongs to other ranks
        return y if any(padding) else y.narrow(1, before, rows.shape[1] - before - after)

    if x.ndim < 3 or len(x._spec.dims[1].sizes) <= 1:
        return wrap(norm(x._local, (before or 1,)), x._spec)
    return sliding(x, {1: checked(Stencil(size, 1, before, 1, after))}, norm, image=True)

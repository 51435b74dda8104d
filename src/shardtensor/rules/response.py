"""Local response normalization: a stencil along channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..registry import rule
from ..tensor import ShardTensor
from .empty import stock
from .norm import sharded
from .sliding import sliding
from .windows import Stencil, checked


@rule(F.local_response_norm)
def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> ShardTensor:
    """Each element by its neighbours along channels."""
    x = sharded(input)
    before, after = size // 2, (size - 1) // 2

    def norm(rows: Tensor, padding: Sequence[int] = (0,)) -> Tensor:
        y = stock(lambda z: F.local_response_norm(z, size, alpha, beta, k), rows.shape, rows)
        # torch pads by itself: what it makes of rows that were fetched belongs to other ranks
        return y if any(padding) else y.narrow(1, before, rows.shape[1] - before - after)

    if x.ndim < 3:
        return sliding(x, {}, norm)  # torch says what is wrong
    return sliding(x, {1: checked(Stencil(size, 1, before, 1, after))}, norm)

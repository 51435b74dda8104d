"""An affine map of each row of a shard, in one or two kernels that round as plain torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .moments import accumulated
from .numbers import rounded, tensors

# standard deviations that a mean may lie from zero for the fast kernel, which rounds at its size
FAR = 16.0


def affine(
    rows: Tensor, a: Any, b: Any, center: Any, at_far: bool, more: tuple[Tensor, Any] | None = None
) -> Tensor:
    """a * (rows - center) + b for each row, at_far: of `far`; more: (values, what times to add)."""
    if not rows.numel():
        return torch.empty_like(rows)
    n, shape = rows.shape[1], (-1, *[1] * (rows.ndim - 2))
    others = () if more is None else more[1:]
    times: Sequence[Tensor]
    if not at_far:
        # the kernel of batch norm with fixed statistics
        scale, shift, at, one, *times = tensors(rows, n, a, b, center, 1.0, *others)
        y = torch.native_batch_norm(rows, scale, shift, at, one, False, 0.0, 0.0)[0]
    else:
        middle = rounded(center, rows)
        half, at, rest, *times = tensors(rows, n, a / 2, middle, b - a * (center - middle), *others)
        y = torch.ops.aten.mse_loss_backward(half.view(shape), rows, at.view(shape), 0)
        y.add_(rest.view(shape))
    return y if more is None else y.addcmul_(more[0], times[0].view(shape))


def alike(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether kernels take these weights beside x as they are."""
    dtype = x.dtype
    return (
        x.numel() > 0
        and dtype == accumulated(dtype)
        and (weight is None or weight.dtype == dtype)
        and (bias is None or bias.dtype == dtype)
    )


def far(rows: Tensor, center: Any, slope: Any) -> bool:
    """Whether a * rows + (b - a * center), which CPUs' kernels compute, would round too much."""
    if not isinstance(center, np.ndarray) or rows.dtype != accumulated(rows.dtype):
        return False
    return bool(np.logical_or.reduce(np.abs(center) * slope > FAR))

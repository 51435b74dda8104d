"""How far two results of the same program may lie apart: what rounding alone does to it."""

from __future__ import annotations

import torch
from torch import Tensor

# how much more than a change in the arguments' last digits another order of sums may do
ROUNDING = 1e3


def differentiable(x: Tensor) -> bool:
    """Whether a gradient can flow through x."""
    return x.is_floating_point() or x.is_complex()


def gap(a: Tensor | None, b: Tensor | None) -> tuple[float, float]:
    """Largest difference, and largest value of b; no gradient is as good as zeros."""
    if a is None or b is None:
        other = b if a is None else a
        if other is None or not other.numel():
            return 0.0, 0.0
        return other.abs().nan_to_num(0, 0, 0).max().item(), 0.0
    if a.shape != b.shape or not differentiable(b):
        return (0.0 if torch.equal(a, b) else float("inf")), 1.0
    if not a.numel():
        return 0.0, 0.0
    most, scale = (a - b).abs().max().item(), b.abs().max().item()
    if most != most or most == float("inf"):
        # equal infinities and NaNs are no difference
        same = (a == b) | (a.isnan() & b.isnan())
        most = torch.where(same, 0, (a - b).abs()).nan_to_num(float("inf")).max().item()
    if scale != scale or scale == float("inf"):
        scale = b.abs().nan_to_num(0, 0, 0).max().item()
    return most, scale


def shaken(x: Tensor, eps: float | None = None) -> Tensor:
    """x with other last digits, eps of its values; x itself where it has none."""
    if not differentiable(x):
        return x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    last = 4 * (torch.finfo(x.dtype).eps if eps is None else eps)
    moved = x.detach() * (1 + last * noise.to(x.device)).to(x.dtype)
    return moved.requires_grad_(x.requires_grad)

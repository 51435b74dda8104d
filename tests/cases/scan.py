"""Running sums, products and extrema, differences, softmax: along every dim."""

import torch
import torch.nn.functional as F

from .table import cases, normal

SCANS = {
    "cumsum": torch.cumsum, "cumprod": torch.cumprod, "logcumsumexp": torch.logcumsumexp,
    "cummax": torch.cummax, "cummin": torch.cummin, "method": lambda a, d: a.cumsum(axis=d),
    "leaf": lambda a, d: torch.ops.aten.cumprod(a, d),
    "trapezoid": lambda a, d: (torch.cumulative_trapezoid(a, dim=d), torch.trapezoid(a, dim=d)),
    "spaced": lambda a, d: torch.cumulative_trapezoid(a, dx=0.5, dim=d),
    "masked": lambda a, d: torch.masked.cumsum(a, d, mask=torch.arange(a.shape[d] * 4).view(-1, 4) % 3 > 0)
    if d == 1 else torch.masked.cumprod(a, d),
    "differences": lambda a, d: (torch.diff(a, dim=d), torch.diff(a, n=2, dim=d),
                                 torch.gradient(a, dim=d, spacing=0.5)),
}  # fmt: skip
SOFT = {
    "softmax": F.softmax, "log_softmax": F.log_softmax, "softmin": F.softmin,
    "torch": torch.softmax, "method": lambda a, d: a.log_softmax(d), "special": torch.special.softmax,
    "leaf": lambda a, d: torch.ops.aten._softmax(a, d, False),
    "safe": lambda a, d: torch.ops.aten._safe_softmax(a, d),
    "far below zero": lambda a, d: F.softmax(a - 1e3, d),
    "class": lambda a, d: torch.nn.Softmax(d)(a), "statistics": lambda a, d: a.mean(d).softmax(0),
}  # fmt: skip


def each_dim(fn):
    return lambda a: [fn(a, d) for d in (0, 1, -1)]


cases("scan", {k: each_dim(f) for k, f in SCANS.items()}, normal(3, 7, 4))
cases("softmax", {k: each_dim(f) for k, f in SOFT.items()}, normal(3, 7, 4))

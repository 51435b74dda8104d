"""Sorting and order statistics, along a dim and over all elements."""

import torch

from .table import D, cases, normal

OPS = {
    "sort": lambda x: x.sort(-1), "descending": lambda x: torch.sort(x, dim=-1, descending=True, stable=True),
    "topk": lambda x: x.topk(3, -1), "smallest": lambda x: torch.topk(x, 2, dim=-1, largest=False),
    "all": lambda x: x.topk(x.shape[-1], -1), "none": lambda x: x.topk(0, -1),
    "argsort": lambda x: x.argsort(-1), "kthvalue": lambda x: x.kthvalue(2, -1),
    "median": lambda x: x.median(-1), "quantile": lambda x: x.quantile(0.3, -1),
}  # fmt: skip
WHOLE = {
    "median": torch.median, "nanmedian": torch.nanmedian, "quantile": lambda x: x.quantile(0.37),
    "quantiles": lambda x: x.quantile(torch.tensor([0.1, 0.5, 1.0], dtype=D), interpolation="lower"),
    "midpoint": lambda x: x.quantile(0.4, interpolation="midpoint"), "msort": torch.msort,
}  # fmt: skip

cases("sort", OPS, normal(3, 4, 7))
cases("sort of a vector", OPS, normal(23))
cases("order", WHOLE, normal(23))
cases("order of all dims", WHOLE, normal(3, 7, 4))

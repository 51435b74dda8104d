"""torch_scatter's sums and means of runs of rows, whose kernels are its own, on sharded rows.

They take effect when the program imports torch_scatter; nothing here does. Its `scatter`, `sum` and
`mean` are torch functions and need no rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch.rule import rule
from ..rules.rows import cut_axes, dims_of

_MODULE = "torch_scatter.segment_csr.segment_"


def _reduced(reduce: str, function: Any, src: Tensor, indptr: Tensor, out: Any = None) -> Any:
    """Rows indptr[..., i] to indptr[..., i + 1] as one; of no rows zeros."""
    lead = indptr.ndim - 1
    served = out is None and lead in (0, 1) and src.is_floating_point()
    if not served or not cut_axes(dims_of(src)[lead]):
        return function.__wrapped__(src, indptr, out)
    if not lead:
        return torch.segment_reduce(src, reduce, offsets=indptr, initial=0)
    samples = zip(src.unbind(0), indptr.expand(len(src), -1).unbind(0), strict=True)
    return torch.stack(
        [torch.segment_reduce(x, reduce, offsets=ends, initial=0) for x, ends in samples]
    )


@rule(_MODULE + "sum_csr", _MODULE + "add_csr")
def segment_sum(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _reduced("sum", function, *args, **kwargs)


@rule(_MODULE + "mean_csr")
def segment_mean(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _reduced("mean", function, *args, **kwargs)


segment_sum.takes_function = True  # type: ignore[attr-defined]
segment_mean.takes_function = True  # type: ignore[attr-defined]

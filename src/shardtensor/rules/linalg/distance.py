"""Distances of all pairs of rows: local where rows are sharded."""

from __future__ import annotations

from torch import Tensor

from ..._torch import kernels
from ...registry import rule
from .. import labels

# torch takes the matrix product for more rows than this
_MANY = 25


@rule("cdist")
def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """x1 (..., P, M), x2 (..., R, M) to (..., P, R).

    The features come to every rank that has rows. Where one mesh axis shards both P and R, the
    operand with fewer rows comes whole.
    """
    if compute_mode is None:
        compute_mode = 1 if max(x1.shape[-2], x2.shape[-2]) > _MANY else 2

    def distances(a: Tensor, b: Tensor) -> Tensor:
        return kernels.functions.cdist(a, b, p, compute_mode)

    return labels.run("... p M, ... r M -> ... p r", distances, x1, x2)

"""Values at some points from values at others."""

from __future__ import annotations

from torch import Tensor

from .search import knn


def interpolate(
    queries: Tensor, points: Tensor, features: Tensor, k: int = 3, power: float = 2.0,
    eps: float = 1e-8,
) -> Tensor:  # fmt: skip
    """The mean of the k nearest points' features, weighted by 1 / (distance**power + eps).

    queries (M, D), points (N, D), features (N, ...): plain or sharded along dim 0, features as
    points are. Returns (M, ...), sharded as the queries are. Inverse distances as in PointNet++ (Qi
    et al. 2017, equation 2). Gradients to all three. Raises ValueError as `knn` does.

    Cost: that of `knn`, and one row of features for each neighbour on another rank.
    """
    if len(features) != len(points):
        raise ValueError(f"features of {len(features)} for {len(points)} points")
    distances, index = knn(queries, points, k)
    weights = 1 / (distances**power + eps)
    weights = weights / weights.sum(1, keepdim=True)
    rows = features[index]
    return (rows * weights.reshape(*weights.shape, *[1] * (rows.ndim - 2))).sum(1)

"""Features of a point cloud at other places."""

from __future__ import annotations

from torch import Tensor

from .search import knn


def interpolate(
    queries: Tensor,
    points: Tensor,
    features: Tensor,
    k: int = 3,
    power: float = 2.0,
    eps: float = 1e-8,
) -> Tensor:
    """Features (M, C) at queries (M, D) from those (N, C) of the k nearest points (N, D).

    Their mean with weights distance ** -power, distances below eps (in the unit of the
    coordinates) taken for eps: Qi et al., PointNet++ (2017), equation 2. Differentiable in all
    three. Sharded and costing as `knn`; of the features each row that a rank needs comes once.
    """
    if features.ndim != 2 or len(features) != len(points):
        raise ValueError(
            f"interpolate: features of shape {tuple(features.shape)} for {len(points)} points"
        )
    distances, index = knn(queries, points, k)
    weights = distances.clamp(min=eps) ** -power
    weights = weights / weights.sum(1, keepdim=True)
    return (weights.to(features.dtype).unsqueeze(-1) * features[index]).sum(1)

"""Point clouds: orders and partitions, neighbours, sampling, interpolation, signed distances."""

from .curves import hilbert_order, kd_order, morton_order
from .interpolate import interpolate
from .partition import Partition, partition
from .sample import farthest_point_sampling
from .sdf import signed_distance
from .search import ball_query, knn, radius

__all__ = [
    "Partition",
    "ball_query",
    "farthest_point_sampling",
    "hilbert_order",
    "interpolate",
    "kd_order",
    "knn",
    "morton_order",
    "partition",
    "radius",
    "signed_distance",
]

"""Point clouds: neighbours, samples and interpolation of points that lie on several ranks."""

from .interpolate import interpolate
from .sample import farthest_point_sampling
from .search import ball_query, knn, radius

__all__ = ["ball_query", "farthest_point_sampling", "interpolate", "knn", "radius"]

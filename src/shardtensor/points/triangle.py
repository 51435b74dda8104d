"""Triangles: the closest point on one, and the angle under which it is seen."""

from __future__ import annotations

import torch
from torch import Tensor


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Products over the last dim (3), added in turn: the same bits on any layout."""
    return x[..., 0] * y[..., 0] + x[..., 1] * y[..., 1] + x[..., 2] * y[..., 2]


def closest(p: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The point (..., 3) of triangle a, b, c that is closest to p; all broadcast.

    Ericson, Real-Time Collision Detection (2004), section 5.1.5. Triangles without area are the
    segments or points that they are.
    """
    ab, ac = b - a, c - a
    d1, d2 = dot(ab, p - a), dot(ac, p - a)
    d3, d4 = dot(ab, p - b), dot(ac, p - b)
    d5, d6 = dot(ab, p - c), dot(ac, p - c)
    va, vb, vc = d3 * d6 - d5 * d4, d5 * d2 - d1 * d6, d1 * d4 - d3 * d2
    # the face, then what has precedence over it: the last region that holds p wins
    whole = va + vb + vc
    v, w = _ratio(vb, whole), _ratio(vc, whole)
    along = _ratio(d4 - d3, (d4 - d3) + (d5 - d6))
    for region, at_v, at_w in (
        ((va <= 0) & (d4 >= d3) & (d5 >= d6), 1 - along, along),
        ((vb <= 0) & (d2 >= 0) & (d6 <= 0), torch.zeros_like(v), _ratio(d2, d2 - d6)),
        ((d6 >= 0) & (d5 <= d6), torch.zeros_like(v), torch.ones_like(w)),
        ((vc <= 0) & (d1 >= 0) & (d3 <= 0), _ratio(d1, d1 - d3), torch.zeros_like(w)),
        ((d3 >= 0) & (d4 <= d3), torch.ones_like(v), torch.zeros_like(w)),
        ((d1 <= 0) & (d2 <= 0), torch.zeros_like(v), torch.zeros_like(w)),
    ):
        v, w = torch.where(region, at_v, v), torch.where(region, at_w, w)
    return a + v[..., None] * ab + w[..., None] * ac


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, 0 where y is 0, with a gradient that is finite."""
    safe = y != 0
    return torch.where(safe, x / torch.where(safe, y, 1), 0)


def turns(p: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The signed solid angle of triangle a, b, c seen from p, over 4 pi.

    Positive from the side that its normal (b - a) x (c - a) points away from. Van Oosterom and
    Strackee, IEEE Trans. Biomed. Eng. 30(2), 125 (1983), equation 8.
    """
    a, b, c = a - p, b - p, c - p
    x, y, z = (dot(e, e).sqrt() for e in (a, b, c))
    below = x * y * z + dot(a, b) * z + dot(b, c) * x + dot(c, a) * y
    return torch.atan2(dot(a, torch.linalg.cross(b, c)), below) / (2 * torch.pi)

"""Triangles: the closest point on one, and the angle under which it is seen."""

from __future__ import annotations

import torch
from torch import Tensor


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Products over the last dim (3), added in turn: the same bits on any layout."""
    return x[..., 0] * y[..., 0] + x[..., 1] * y[..., 1] + x[..., 2] * y[..., 2]


def closest(p: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The point (..., 3) of triangle a, b, c that is closest to p; all broadcast.

    The nearest of the projection, where that lies inside, and of the closest points of the edges:
    Ericson, Real-Time Collision Detection (2004), sections 5.1.5 and 5.1.2. Unlike a choice by the
    signs of areas this holds for slivers, and for triangles that are segments or points.
    """
    ab, ac, bc = b - a, c - a, c - b
    ap, bp, cp = p - a, p - b, p - c
    d1, d2, d3, d4, d5, d6 = (dot(e, x) for x in (ap, bp, cp) for e in (ab, ac))
    va, vb, vc = d3 * d6 - d5 * d4, d5 * d2 - d1 * d6, d1 * d4 - d3 * d2
    whole = va + vb + vc
    inside = (va >= 0) & (vb >= 0) & (vc >= 0) & (whole > 0)
    at_ab, at_ac, at_bc = (
        _ratio(along, dot(e, e)).clamp(0, 1) for along, e in ((d1, ab), (d2, ac), (dot(bc, bp), bc))
    )
    zero = torch.zeros_like(whole)
    v, w = torch.where(inside, _ratio(vb, whole), 0), torch.where(inside, _ratio(vc, whole), 0)
    best = None
    for new_v, new_w in ((v, w), (at_ab, zero), (zero, at_ac), (1 - at_bc, at_bc)):
        to = ap - new_v[..., None] * ab - new_w[..., None] * ac
        d = dot(to, to).detach()
        if best is not None:
            nearer = d < best
            v, w = torch.where(nearer, new_v, v), torch.where(nearer, new_w, w)
            d = torch.minimum(d, best)
        best = d
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

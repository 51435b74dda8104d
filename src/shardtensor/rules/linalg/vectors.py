"""Products, powers, norms and distances of vectors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import _torch
from ...cache import cached
from ...dispatch.fallback import fall_back
from ...dispatch.trial import tried
from ...registry import rule
from ...spec import Dim
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import fit, reduced
from .. import labels
from ..empty import stock
from ..in_place import in_place
from ..operands import in_order
from ..reduce import over


@rule("linalg_cross")
def linalg_cross(input: Tensor, other: Tensor, *, dim: int = -1) -> Tensor:
    """Elementwise but along dim, whose shards move to another dim; a vector is gathered."""
    if input.ndim != other.ndim:
        raise RuntimeError(
            f"linalg.cross: inputs must have the same number of dimensions: {input.ndim}, "
            f"{other.ndim}"
        )
    if not input.ndim:
        raise RuntimeError(f"linalg.cross: inputs dimension {dim} must have length 3")
    (d,) = over(dim, input.ndim)
    each, *_ = labels.elementwise(input.ndim)
    term = (*each[:d], "X", *each[d + 1 :])
    cross = partial(torch.linalg.cross, dim=dim)
    return labels.run((term, term, term), cross, input, other)


@rule("cross")
def cross(input: Tensor, other: Tensor, dim: int | None = None) -> Tensor:
    """Along the first dim of size 3, where none is named."""
    if dim is None:
        dim = next((d for d, n in enumerate(input.shape) if n == 3), None)
    if dim is None:
        raise RuntimeError("no dimension of size 3 in input")
    return torch.linalg.cross(input, other, dim=dim)


@rule("vdot")
def vdot(input: Tensor, other: Tensor) -> Tensor:
    return torch.dot(input.conj(), other)


@rule("linalg_vecdot")
def vecdot(x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
    if x.dtype != y.dtype or not (x.is_floating_point() or x.is_complex()):
        tried(torch.linalg.vecdot, x, y)
    product = x.conj() * y
    total = product.sum(dim, dtype=product.dtype)
    kind = total.device.type
    if torch.is_autocast_enabled(kind) and total.dtype is torch.float32:
        # it is a product of matrices for torch
        total = total.to(torch.get_autocast_dtype(kind))
    return total


@rule("linalg_vander")
def vander(x: ShardTensor, *, N: int | None = None) -> ShardTensor:
    """A row of powers for each element."""
    x = reduced(x)
    if x.ndim == 0:
        return fall_back(torch.linalg.vander, (x,), {"N": N})
    n = x.shape[-1] if N is None else N
    spec = x._spec.insert(x.ndim, Dim(max(0, n)))
    local = stock(lambda z: torch.linalg.vander(z, N=n), spec.local_shape, x._local)
    return wrap(local, spec)


@rule("renorm")
def renorm(input: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    """Slices along dim scaled down to the norm maxnorm where theirs is larger."""
    (d,) = over(dim, input.ndim)
    if input.ndim < 2 or p <= 0 or not maxnorm >= 0:
        return fall_back(torch.renorm, (input, p, dim, maxnorm), {})
    others = [i for i in range(input.ndim) if i != d]
    halves = input.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if halves else None
    norm = torch.linalg.vector_norm(input.detach(), p, others, True, dtype=dtype)
    larger = norm > maxnorm
    if _torch.differentiated(input):
        # of the others no slope counts, not even one that is NaN
        norm = torch.linalg.vector_norm(torch.where(larger, input, 0), p, others, True, dtype=dtype)
    # torch's own guard against a division by zero
    factor = torch.where(larger, maxnorm / (norm + 1e-7), 1.0)
    return in_order(input * factor.to(input.dtype))


in_place(renorm, reads=True)

# distances of all pairs --------------------------------------------------------------------------


@cached
def _pairs(n: int, dim: Dim) -> tuple[tuple[int, ...], Dim]:
    """(edges between the ranks' rows, the dim of pairs): rows so that pairs are even."""
    total, parts = n * (n - 1) // 2, len(dim.sizes)
    edges, before = [0], 0
    for row in range(n):
        while len(edges) < parts and before * parts >= total * len(edges):
            edges.append(row)
        before += n - 1 - row
    edges += [n] * (parts + 1 - len(edges))
    starts = [r * (2 * n - 1 - r) // 2 if r < n else total for r in edges]
    return tuple(edges), dim.cut_at(starts)


@rule("pdist")
def pdist(input: ShardTensor, p: float = 2.0) -> Any:
    """The rows come to every rank; the pairs, of which there are many more, are shared out."""
    x = reduced(input)
    if x.ndim != 2 or x.shape[0] < 2 or not x._spec.varying or not x.shape[1]:
        return fall_back(torch.pdist, (x, p), {})
    spec = x._spec
    n, axes = x.shape[0], spec.varying
    edges, dim = _pairs(n, Dim.chunked(n, axes, spec.mesh))
    out = spec.with_dims([dim])
    (rows,) = fit(spec.mesh, axes, (x, None))
    a, b = edges[out.index[0] : out.index[0] + 2]
    # row i - a meets the rows after it
    i, j = torch.triu_indices(b - a, n - a, 1, device=x.device)
    every = torch.cdist(rows[a:b], rows[a:], p, compute_mode="donot_use_mm_for_euclid_dist")
    return wrap(every[i, j], out)

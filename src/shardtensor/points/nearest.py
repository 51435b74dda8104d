"""The best of some candidates for each query, block by block: plain tensors.

Squared distances are sums in the order of the coordinates, so they do not depend on how points are
cut into blocks. Equal ones are taken in the order of their indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# squared distances that are held at a time
CHUNK = 1 << 22
NONE = -1


def squared_distances(q: Tensor, p: Tensor) -> Tensor:
    """(..., M, N) from q (..., M, D) and p (..., N, D)."""
    total = (q[..., :, None, 0] - p[..., None, :, 0]).square()
    for d in range(1, q.shape[-1]):
        total = total + (q[..., :, None, d] - p[..., None, :, d]).square()
    return total


@dataclass
class Best:
    """The k best candidates of each of M queries so far.

    d2 (M, k): squared distances, inf where there is none. index (M, k): int64, NONE likewise.
    inside (M,): how many were within the radius. by_index: the lowest indices, else the nearest.
    """

    d2: Tensor
    index: Tensor
    inside: Tensor
    limit: float | None
    by_index: bool

    @classmethod
    def empty(cls, q: Tensor, k: int, limit: float | None, by_index: bool) -> Best:
        """None yet. limit: the largest squared distance."""
        d2 = q.new_full((len(q), k), torch.inf)
        index = torch.full((len(q), k), NONE, device=q.device)
        return cls(d2, index, index.new_zeros(len(q)), limit, by_index)

    def add(self, q: Tensor, p: Tensor, index: Tensor) -> None:
        """More candidates: points p (N, D) with their indices (N,)."""
        if not len(p):
            return
        for a, b in _chunks(len(q), len(p)):
            d2 = squared_distances(q[a:b], p)
            at = index.expand(d2.shape)
            if self.limit is not None:
                far = d2 > self.limit
                self.inside[a:b] += (~far).sum(1)
                d2 = d2.masked_fill(far, torch.inf)
                at = at.masked_fill(far, NONE)
            self._keep(a, b, d2, at)

    def merge(self, other: Best) -> None:
        """The candidates that somebody else found for the same queries."""
        self.inside += other.inside
        for a, b in _chunks(len(self.d2), self.d2.shape[1]):
            self._keep(a, b, other.d2[a:b], other.index[a:b])

    def _keep(self, a: int, b: int, d2: Tensor, index: Tensor) -> None:
        k = self.d2.shape[1]
        d2 = torch.cat((self.d2[a:b], d2), 1)
        index = torch.cat((self.index[a:b], index), 1)
        # what is not there comes last among equals
        last = index.masked_fill(index == NONE, torch.iinfo(torch.int64).max)
        order = last.argsort(1)[:, :k] if self.by_index else _nearest(d2, last, k)
        self.d2[a:b], self.index[a:b] = d2.gather(1, order), index.gather(1, order)


def _chunks(queries: int, points: int) -> Iterator[tuple[int, int]]:
    rows = max(1, CHUNK // max(1, points))
    for a in range(0, queries, rows):
        yield a, min(a + rows, queries)


def _nearest(d2: Tensor, index: Tensor, k: int) -> Tensor:
    """Places of the k least of each row, by distance, then by index."""
    more = min(k + 1, d2.shape[1])
    few = d2.topk(more, 1, largest=False)
    if more > k and bool((few.values[:, k - 1] == few.values[:, k]).any()):
        # the k-th has an equal that was left out
        order = index.argsort(1)
        return order.gather(1, d2.gather(1, order).sort(dim=1, stable=True).indices)[:, :k]
    order = few.indices[:, :k]
    by_index = order.gather(1, index.gather(1, order).argsort(1))
    return by_index.gather(1, d2.gather(1, by_index).sort(dim=1, stable=True).indices)

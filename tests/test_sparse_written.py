"""Sparse convolutions as people write them: pairs of sites found by keys, gather, matmul, scatter."""

from itertools import product

import pytest
import torch
from test_sparse import dense_conv, sites
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.rules import nodes

D = torch.float64
SHAPE, KERNEL = (6, 7, 5), (3, 3, 3)
OFFSETS = torch.tensor(list(product((-1, 0, 1), repeat=3)))


def keys(coords):
    """A number for each coordinate, also one beside the grid."""
    y = coords + 1
    return (y[:, 0] * (SHAPE[1] + 2) + y[:, 1]) * (SHAPE[2] + 2) + y[:, 2]


def searched(coords):
    """For each offset the sites that have a neighbour there, by sorted keys: (input, output)."""
    ordered, order = keys(coords).sort()
    for offset in OFFSETS:
        wanted = keys(coords + offset)
        at = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
        found = ordered[at] == wanted
        out = found.nonzero()[:, 0]
        yield order[at[found]], out


def tabled(coords):
    """The same by a table of the grid, -1 where nothing is (a hash table of few collisions)."""
    table = torch.full(((SHAPE[0] + 2) * (SHAPE[1] + 2) * (SHAPE[2] + 2),), -1)
    table[keys(coords)] = torch.arange(len(coords))
    for offset in OFFSETS:
        at = table[keys(coords + offset)]
        out = torch.where(at >= 0)[0]
        yield at[out], out


def padded(coords):
    """As spconv has them: (2, offsets, N) filled up with -1, and how many there are of each."""
    pairs, counts = torch.full((2, len(OFFSETS), len(coords)), -1), []
    for k, (i, o) in enumerate(searched(coords)):
        pairs[0, k, : len(i)] = i
        pairs[1, k, : len(o)] = o
        counts.append(len(i))
    for k, n in enumerate(counts):
        yield pairs[0, k, :n], pairs[1, k, :n]


def by_index_add(x, weight, pairs):
    out = x.new_zeros(len(x), weight.shape[2])
    for w, (i, o) in zip(weight, pairs, strict=True):
        out.index_add_(0, o, x[i] @ w)
    return out


def by_scatter(x, weight, pairs):
    out = torch.zeros(len(x), weight.shape[2], dtype=x.dtype)
    for w, (i, o) in zip(weight, pairs, strict=True):
        values = torch.mm(torch.index_select(x, 0, i), w)
        out = out.scatter_add(0, o[:, None].expand_as(values), values)
    return out


def by_rows(x, weight, pairs):
    """Each output row once for an offset: read, add, write."""
    out = torch.zeros(len(x), weight.shape[2], dtype=x.dtype)
    for w, (i, o) in zip(weight, pairs, strict=True):
        out = out.index_put((o,), x[i] @ w, accumulate=True)
    return out


def by_one_product(x, weight, pairs):
    """All pairs in one product, as an implicit GEMM."""
    i, o, k = zip(*((i, o, torch.full_like(i, n)) for n, (i, o) in enumerate(pairs)), strict=True)
    i, o, k = torch.cat(i), torch.cat(o), torch.cat(k)
    values = torch.einsum("ec,ecd->ed", x[i], weight[k])
    return torch.zeros(len(x), weight.shape[2], dtype=x.dtype).index_add(0, o, values)


FOUND = {f.__name__: f for f in (searched, tabled, padded)}
SUMS = {f.__name__: f for f in (by_index_add, by_scatter, by_rows, by_one_product)}


class Net(nn.Module):
    """Two convolutions over the same pairs, a norm of the active sites between them."""

    def __init__(self, find, add):
        super().__init__()
        self.find, self.add = find, add
        g = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(27, 3, 4, generator=g, dtype=D))
        self.last = nn.Parameter(torch.randn(27, 4, 2, generator=g, dtype=D))
        self.norm = nn.BatchNorm1d(4, dtype=D)

    def forward(self, x, coords):
        pairs = list(self.find(coords))
        x = self.norm(self.add(x, self.first, pairs)).relu()
        return self.add(x, self.last, pairs)


WAYS = dict.fromkeys([*((f, "by_index_add") for f in FOUND), *(("searched", a) for a in SUMS)])


@pytest.mark.parametrize("find, add", WAYS)
def test_written_by_hand(find, add, monkeypatch):
    # a table of more elements than this grid has would be cut
    monkeypatch.setattr(nodes, "WHOLE", 1)
    coords = sites(SHAPE, 40, order=False)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=D)
    cuts = [(17, 23), (0, 25, 15)] if add == "by_index_add" else [(23, 17)]
    for cut in cuts:
        net = Net(FOUND[find], SUMS[add])
        T.hold(net, [x, coords], [T.shard(0, cut)] * 2, (len(cut),), atol=1e-12)
        T.hold(net, [x, coords], [T.shard(0, cut), None], (len(cut),), atol=1e-12)


def test_it_is_the_dense_convolution():
    coords = sites(SHAPE, 40)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=D)
    weight = torch.randn(27, 3, 4, generator=torch.Generator().manual_seed(3), dtype=D)
    want = dense_conv(x, coords, weight, KERNEL, SHAPE, padding=1)[tuple(coords.T)]

    def rank():
        mesh = T.make_mesh((2,))
        a, b = (st.distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for t in (x, coords))
        return by_index_add(a, weight, list(searched(b))).full_tensor()

    for got in st.simulate(2, rank):
        assert torch.allclose(got, want, atol=1e-12)

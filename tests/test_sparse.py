"""Sparse convolutions, held against torch's dense ones on the whole grid."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

D = torch.float64


def sites(shape, n, seed=0, order=True):
    """n distinct coordinates in a grid, in row-major or random order."""
    g = torch.Generator().manual_seed(seed)
    flat = torch.randperm(int(torch.tensor(shape).prod()), generator=g)[:n]
    flat = flat.sort().values if order else flat
    return torch.stack(torch.unravel_index(flat, shape), 1)


def dense(features, coords, shape):
    grid = features.new_zeros(*shape, features.shape[1])
    return grid.index_put(tuple(coords.T), features).movedim(-1, 0)[None]


def dense_conv(features, coords, weight, kernel, shape, bias=None, **options):
    w = weight.reshape(*kernel, *weight.shape[1:]).movedim((-1, -2), (0, 1))
    conv = F.conv2d if len(shape) == 2 else F.conv3d
    return conv(dense(features, coords, shape), w, bias, **options)[0].movedim(0, -1)


def submanifold(features, coords, weight, bias, kernel, dilation, shape):
    if isinstance(features, st.ShardTensor):
        return st.sparse.submanifold_conv(features, coords, weight, kernel, dilation, bias)
    pad = [d * (k // 2) for k, d in zip(kernel, dilation, strict=True)]
    out = dense_conv(features, coords, weight, kernel, shape, bias, dilation=dilation, padding=pad)
    return out[tuple(coords.T)]


@pytest.mark.parametrize("shape, kernel, dilation, n", [
    ((7, 6), (3, 3), (1, 1), 17), ((7, 6), (3, 3), (2, 1), 17), ((5, 4, 6), (3, 1, 5), (1, 1, 1), 31),
    ((4, 4, 4), (3, 3, 3), (1, 1, 1), 4),
])  # fmt: skip
@pytest.mark.parametrize("ordered", [True, False])
def test_submanifold(shape, kernel, dilation, n, ordered):
    at = sites(shape, n, order=ordered)
    k = int(torch.tensor(kernel).prod())
    x, w, b = (torch.randn(s, dtype=D) for s in ((n, 2), (k, 2, 3), (3,)))
    for cut in T.cuts(n):
        args = [x, at, w, b, kernel, dilation, shape]
        places = [T.shard(0, cut), T.shard(0, cut), *[None] * 5]
        (spec,) = T.hold(submanifold, args, places, (len(cut),))
        assert spec.dims[0].sizes == cut


def strided(features, coords, weight, bias, kernel, stride, padding, dilation, shape):
    """On the dense output grid, and the mask of its sites."""
    options = dict(stride=stride, padding=padding, dilation=dilation)
    if not isinstance(features, st.ShardTensor):
        out = dense_conv(features, coords, weight, kernel, shape, **options)
        one = torch.ones(len(coords), 1, dtype=D)
        every = torch.ones(weight.shape[0], 1, 1, dtype=D)
        mask = dense_conv(one, coords, every, kernel, shape, **options) > 0
        return (out + bias) * mask, mask
    out, at = st.sparse.sparse_conv(
        features, coords, weight, kernel, stride, padding, dilation, bias, shape=shape
    )
    assert out.spec.dims[0] == at.spec.dims[0]
    grid = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(shape, kernel, stride, padding, dilation, strict=True)
    ]
    empty = torch.zeros(*grid, weight.shape[2], dtype=D)
    found = tuple(at.full_tensor().T)
    mask = torch.zeros(*grid, 1, dtype=torch.bool).index_put(found, torch.tensor(True))
    return empty.index_put(found, out.full_tensor()), mask


@pytest.mark.parametrize("shape, kernel, stride, padding, dilation, n", [
    ((9, 8), (3, 3), (2, 2), (1, 1), (1, 1), 13), ((9, 8), (2, 2), (2, 2), (0, 0), (1, 1), 13),
    ((9, 8), (3, 2), (1, 3), (2, 0), (2, 1), 13), ((5, 6, 7), (3, 3, 3), (2, 1, 2), (1, 0, 1), (1, 1, 1), 21),
])  # fmt: skip
def test_strided(shape, kernel, stride, padding, dilation, n):
    at = sites(shape, n, order=False)
    k = int(torch.tensor(kernel).prod())
    x, w, b = (torch.randn(s, dtype=D) for s in ((n, 2), (k, 2, 3), (3,)))
    for cut in T.cuts(n):
        args = [x, at, w, b, kernel, stride, padding, dilation, shape]
        T.hold(strided, args, [T.shard(0, cut), T.shard(0, cut), *[None] * 7], (len(cut),))


def unbounded():
    """Without a shape every reached site is an output, also at negative coordinates."""
    mesh = T.make_mesh((3,))
    at = torch.tensor([[-5, 0], [0, 0], [7, -3], [8, -3]])
    x = torch.randn(4, 1, dtype=D, generator=torch.Generator().manual_seed(0))
    w = torch.ones(9, 1, 1, dtype=D)
    put = [
        st.distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None, sizes={0: (1, 0, 3)})
        for t in (x, at)
    ]
    out, where = st.sparse.sparse_conv(*put, w, 3, padding=1)
    want = {}
    for site, v in zip(at.tolist(), x[:, 0].tolist(), strict=True):
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                key = (site[0] + i, site[1] + j)
                want[key] = want.get(key, 0) + v
    got = {
        tuple(k): v
        for k, v in zip(where.full_tensor().tolist(), out.full_tensor()[:, 0].tolist(), strict=True)
    }
    assert got.keys() == want.keys() and len(got) == len(where)
    assert all(abs(got[k] - want[k]) < 1e-12 for k in want)


def test_unbounded():
    st.simulate(3, unbounded)


def costs():
    me, n = dist.get_rank(), 3
    shape = (12, 6)
    every = torch.stack(torch.unravel_index(torch.arange(72), shape), 1)
    mesh = T.make_mesh((n,))
    coords, x = (
        st.distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)
        for t in (every, torch.randn(72, 5, dtype=D))
    )
    x.requires_grad_()
    w = torch.randn(9, 5, 2, dtype=D)
    st.sparse.submanifold_conv(x, coords, w, 3)
    with st.trace() as t:
        out = st.sparse.submanifold_conv(x, coords, w, 3)
    # shards of four rows of the grid: one row of six sites to each neighbour, and no requests
    assert [s.collective for s in t.sent] == ["take"]
    assert t.bytes == (2 if me == 1 else 1) * 6 * 5 * 8
    total = out.sum()
    with st.trace() as b:
        total.backward()
    assert [s.collective for s in b.sent] == ["put"] and b.bytes == t.bytes


def test_sends_the_rows_of_neighbours():
    st.simulate(3, costs)


def refusals():
    mesh = T.make_mesh((2,))

    def put(t, dim=0):
        return st.distribute_tensor(t, mesh, [Shard(dim)], src_data_rank=None)

    x, at = torch.randn(4, 2, dtype=D), torch.tensor([[0, 0], [1, 2], [3, 1], [0, 1]])
    w = torch.randn(9, 2, 2, dtype=D)
    for error, match, features, coords, weight, kernel in [
        (ValueError, "occurs more than once", put(x), put(at.where(at != 3, 0)), w, 3),
        (
            ValueError,
            "occurs more than once",
            put(x),
            put(at.new_tensor([[0, 0], [1, 2], [0, 0], [4, 4]])),
            w,
            3,
        ),
        (ValueError, "use odd sizes", put(x), put(at), w, 2),
        (ValueError, "a weight of shape", put(x), put(at), w[:8], 3),
        (ValueError, "more than 62 bits", put(x), put(at * 2**33), w, 3),
        (ValueError, "expected int64", put(x), put(at.double()), w, 3),
        (st.UnsupportedOpError, "shard both along dim 0", put(x, 1), put(at), w, 3),
    ]:
        with pytest.raises(error, match=match):
            st.sparse.submanifold_conv(features, coords, weight, kernel)


def test_refuses():
    st.simulate(2, refusals)

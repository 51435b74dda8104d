"""Attention over sharded tokens, heads and batch against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
q, k, v = (torch.randn(2, 4, n, 8, dtype=D) for n in (9, 9, 9))
k2, v2 = torch.randn(2, 4, 7, 8, dtype=D), torch.randn(2, 4, 7, 6, dtype=D)
sdpa = F.scaled_dot_product_attention
SELF = T.cuts(9)


def causal(a, b, c):
    return sdpa(a, b, c, is_causal=True)


@pytest.mark.parametrize("cut", SELF)
def test_ring(cut):
    n, s = (len(cut),), T.shard(2, cut)
    T.hold(sdpa, [q, k, v], [s, s, s], n)
    T.hold(causal, [q, k, v], [s, s, s], n)
    T.hold(causal, [q, k, v], [T.shard(2), s, s], n)
    T.hold(lambda a, b, c: sdpa(a, b, c, scale=0.1), [q, k2, v2], [s, T.shard(2), T.shard(2)], n)
    T.hold(causal, [q, k2, v2], [s, T.shard(2), T.shard(2)], n)
    T.hold(sdpa, [q, k, v], [s, s, None], n)


@pytest.mark.parametrize("cut", SELF)
def test_whole_keys_or_queries(cut):
    n, s = (len(cut),), T.shard(2, cut)
    T.hold(sdpa, [q, k, v], [s, None, None], n)
    T.hold(causal, [q, k2, v2], [s, T.replicated(), None], n)
    T.hold(sdpa, [q, k, v], [None, s, s], n)
    T.hold(sdpa, [q[:, :, :1], k, v], [T.replicated(), s, s], n)
    T.hold(causal, [q, k, v], [T.replicated(), s, s], n)


@pytest.mark.parametrize("cut", SELF)
def test_masks(cut):
    n, s = (len(cut),), T.shard(2, cut)
    keep = torch.rand(9, 9) > 0.3
    keep[2] = False
    keep[:, 0] = True
    keep[4] = False
    bias = torch.randn(2, 1, 9, 9, dtype=D)
    for mask in (keep, bias, keep[None, None, :1], torch.where(keep, 0.0, float("-inf")).to(D)):
        fixed = mask
        T.hold(lambda a, b, c, m=fixed: sdpa(a, b, c, m), [q, k, v], [s, s, s], n)
    T.hold(lambda a, b, c: sdpa(a, b, c, keep), [q, k, v], [None, s, s], n)
    # a mask with a gradient (relative position bias)
    T.hold(sdpa, [q, k, v, bias], [s, s, s, None], n)


def test_other_dims():
    for d in (0, 1, 3):
        T.hold(sdpa, [q, k, v], [T.shard(d)] * 3, (2,))
        T.hold(causal, [q, k, v], [T.shard(d), None, T.shard(2)], (3,))
    T.hold(sdpa, [q[0, 0], k[0, 0], v[0, 0]], [T.shard(0)] * 3, (2,))
    T.hold(sdpa, [q[0], k[0], v[0]], [T.shard(1)] * 3, (3,))
    T.hold(sdpa, [q[None], k[None], v[None]], [T.shard(3)] * 3, (3,))
    T.hold(lambda a, b, c: sdpa(a, b, c, enable_gqa=True), [q, k[:, :2], v[:, :2]],
           [T.shard(2)] * 3, (3,))  # fmt: skip


@pytest.mark.parametrize(
    "placements",
    [[Shard(2), Shard(2)], [Shard(1), Shard(2)], [Shard(2), Shard(0)], [Replicate(), Shard(2)]],
)
def test_two_axes(placements):
    T.hold(causal, [q, k, v], [T.On(placements)] * 3, (2, 2))
    T.hold(sdpa, [q, k, v], [T.On(placements), T.On([Shard(2), Replicate()]), None], (2, 2))
    other = T.On([Replicate(), Shard(2)])
    T.hold(sdpa, [q, k, v], [T.On([Shard(2), Replicate()]), other, other], (2, 2))


def test_precision():
    s = [T.shard(2, (4, 0, 5))] * 3
    T.hold(causal, [q.float(), k.float(), v.float()], s, (3,))
    T.hold(sdpa, [q.float() * 100, k.float() * 100, v.float()], s, (3,))
    half = [x.to(torch.bfloat16) for x in (q, k, v)]
    T.hold(sdpa, half, s, (3,), rtol=3e-2)
    wide = torch.randn(2, 4, 9, 5, dtype=D)
    T.hold(sdpa, [q, k, wide], s, (3,))


def sent(is_causal):
    mesh = T.make_mesh((4,))
    x = st.distribute_tensor(torch.randn(1, 2, 16, 8), mesh, [Shard(2)]).requires_grad_()
    with st.trace() as forward:
        y = sdpa(x, x, x, is_causal=is_causal)
    g = torch.ones_like(y)
    with st.trace() as backward:
        y.backward(g)
    return [s.bytes for s in forward.sent], [s.bytes for s in backward.sent]


@pytest.mark.parametrize("is_causal", [False, True])
def test_what_is_sent(is_causal):
    own = 2 * (2 * 4 * 8 * 4)
    for forward, backward in st.simulate(4, sent, is_causal):
        assert forward == [own] * 3
        assert sum(backward) == 7 * own


def kept():
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(torch.randn(1, 1, 256, 8), mesh, [Shard(2)]).requires_grad_()
    from shardtensor.measure import saved_bytes

    return saved_bytes(lambda: sdpa(x * 1, x * 1, x * 1))


def test_no_scores_are_kept():
    scores = 128 * 128 * 4
    assert all(n < scores for n in st.simulate(2, kept))


def second():
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(q, mesh, [Shard(2)]).requires_grad_()
    (g,) = torch.autograd.grad(sdpa(x, x, x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        g.sum().backward()
    d = F.dropout(x, 0.0)
    with pytest.raises(st.UnsupportedOpError, match="dropout"):
        sdpa(d, d, d, dropout_p=0.1)


def test_refused():
    st.simulate(2, second)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first):
    mha = nn.MultiheadAttention(8, 2, batch_first=batch_first, dtype=D)
    x = torch.randn(2, 7, 8, dtype=D) if batch_first else torch.randn(7, 2, 8, dtype=D)
    dim = 1 if batch_first else 0

    class Self(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.m, self.weights = mha, weights

        def forward(self, a):
            return self.m(a, a, a, need_weights=self.weights)

    for cut in T.cuts(7):
        T.hold(Self(False), [x], [T.shard(dim, cut)], (len(cut),))
    T.hold(Self(True), [x], [T.shard(dim)], (2,))
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first, dtype=D)
    T.hold(layer, [x], [T.shard(dim)], (3,))
    T.hold(layer.eval(), [x], [T.shard(dim)], (3,))

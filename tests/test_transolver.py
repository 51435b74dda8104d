"""Physics attention on points that are sharded: only tensors of slices travel."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

D = torch.float64
B, N, M, C, H, S = 2, 17, 9, 8, 2, 5  # batch, points, geometry points, channels, heads, slices


class PhysicsAttention(nn.Module):
    """Wu et al. (2024), "Transolver", section 3.2, for irregular meshes: equations 2 to 4."""

    def __init__(self):
        super().__init__()
        d = C // H
        self.x, self.fx, self.out = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.slice = nn.Linear(d, S)
        self.temperature = nn.Parameter(torch.full((1, H, 1, 1), 0.5))
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))

    def sliced(self, points):
        """(weights (B, H, N, S), tokens (B, H, S, d)) of points (B, N, C)."""
        heads = [f(points).unflatten(-1, (H, -1)).transpose(1, 2) for f in (self.x, self.fx)]
        weights = (self.slice(heads[0]) / self.temperature).softmax(-1)
        tokens = torch.einsum("bhnc,bhng->bhgc", heads[1], weights)
        return weights, tokens / (weights.sum(2)[..., None] + 1e-5)

    def attended(self, tokens):
        q, k, v = self.q(tokens), self.k(tokens), self.v(tokens)
        return nn.functional.scaled_dot_product_attention(q, k, v)

    def desliced(self, tokens, weights):
        points = torch.einsum("bhgc,bhng->bhnc", tokens, weights)
        return self.out(points.transpose(1, 2).flatten(2))

    def forward(self, points):
        weights, tokens = self.sliced(points)
        return self.desliced(self.attended(tokens), weights)


class Block(nn.Module):
    """Transolver's equation 5."""

    def __init__(self, attention=PhysicsAttention):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2))
        self.attention = attention()
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x, *context):
        x = x + self.attention(self.norms[0](x), *context)
        return x + self.mlp(self.norms[1](x))


class GeometryAttention(PhysicsAttention):
    """Slices also ask the tokens of a geometry, another set of points, as GeoTransolver does."""

    def __init__(self):
        super().__init__()
        self.context = PhysicsAttention()
        d = C // H
        self.cq, self.ck, self.cv = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.mix = nn.Parameter(torch.tensor(0.3))

    def forward(self, points, geometry):
        weights, tokens = self.sliced(points)
        _, context = self.context.sliced(geometry)
        q, k, v = self.cq(tokens), self.ck(context), self.cv(context)
        cross = nn.functional.scaled_dot_product_attention(q, k, v)
        gate = self.mix.sigmoid()
        return self.desliced(gate * self.attended(tokens) + (1 - gate) * cross, weights)


class Net(nn.Module):
    def __init__(self, attention, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(attention) for _ in range(depth))
        self.lift, self.head = nn.Linear(3, C), nn.Linear(C, 1)
        self.geometry = nn.Linear(3, C) if attention is GeometryAttention else None

    def forward(self, x, *geometry):
        context = [self.geometry(y) for y in geometry]
        x = self.lift(x)
        for block in self.blocks:
            x = block(x, *context)
        return self.head(x)


X = torch.randn(B, N, 3, generator=torch.Generator().manual_seed(0), dtype=D)
Y = torch.randn(B, M, 3, generator=torch.Generator().manual_seed(1), dtype=D)


@pytest.mark.parametrize("cut", T.cuts(N))
def test_transolver(cut):
    torch.manual_seed(0)
    (spec,) = T.hold(Net(PhysicsAttention).to(D), [X], [T.shard(1, cut)], (len(cut),))
    assert spec.dims[1].sizes == cut


@pytest.mark.parametrize("cut", T.cuts(M))
def test_geometry(cut):
    torch.manual_seed(0)
    net, n = Net(GeometryAttention).to(D), len(cut)
    points = (N - n + 1, *[1] * (n - 1))
    for at in (T.shard(1, cut), None):
        (spec,) = T.hold(net, [X, Y], [T.shard(1, points), at], (n,))
        assert spec.dims[1].sizes == points


def test_two_axes():
    torch.manual_seed(0)
    net = Net(GeometryAttention).to(D)
    for place in ([Shard(0), Shard(1)], [Shard(1), Shard(1)], [Shard(1), Shard(2)]):
        T.hold(net, [X, Y], [T.On(place), T.On([Shard(0), Shard(1)])], (2, 2))


def costs(attention):
    mesh, n = T.make_mesh((3,)), 3
    torch.manual_seed(0)
    net = Net(attention, 1).to(D)
    given = [
        st.distribute_tensor(t, mesh, [Shard(1)], src_data_rank=None, sizes={1: s})
        for t, s in ((X, (9, 0, 8)), (Y, (2, 6, 1)))
    ]
    given = given[: 1 + (attention is GeometryAttention)]
    with st.trace() as f:
        out = net(*given)
    # of each point set the slices' tokens (B, H, S, d) and the sums of their weights (B, H, S);
    # so few go to every other rank at once
    sums = [8 * B * H * S * k for k in (C // H, 1)] * len(given)
    assert {s.collective for s in f.sent} == {"all_reduce"}
    assert sorted(s.bytes for s in f.sent) == sorted((n - 1) * b for b in sums)
    loss = out.square().mean()
    with st.trace() as b:
        loss.backward()
    # the slices' cotangents, and the gradients of weights, which no point set's size enters
    assert {s.collective for s in b.sent} == {"all_reduce"}
    weights = 8 * sum(p.numel() for p in net.parameters())
    assert b.bytes <= (n - 1) * (2 * sum(sums) + weights)


@pytest.mark.parametrize("attention", [PhysicsAttention, GeometryAttention])
def test_only_slices_travel(attention):
    st.simulate(3, costs, attention, transport="plain")

"""Inverse-distance interpolation against all weights."""

import itertools

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
q, p, f = torch.randn(9, 3, dtype=D), torch.randn(13, 3, dtype=D), torch.randn(13, 4, dtype=D)


def serial(q, p, f, k=3, power=2.0, eps=1e-8):
    d2 = ((q[:, None] - p) ** 2).sum(-1)
    index = d2.sort(dim=1, stable=True).indices[:, :k]
    near = d2.gather(1, index)
    d = torch.where(near > 0, torch.where(near > 0, near, 1).sqrt(), 0)
    w = 1 / d.clamp(min=eps) ** power
    return torch.einsum("mk,mkc->mc", w, f[index]) / w.sum(1, keepdim=True)


def fn(*rest):
    def run(q, p, f):
        sharded = any(isinstance(x, st.ShardTensor) for x in (q, p, f))
        return (st.points.interpolate if sharded else serial)(q, p, f, *rest)

    return run


def test_plain():
    for rest in ((), (1,), (13, 1.0), (4, 3.0, 0.5)):
        got = st.points.interpolate(q, p, f, *rest)
        assert type(got) is torch.Tensor and torch.allclose(got, serial(q, p, f, *rest), rtol=1e-12)


@pytest.mark.parametrize("rest", [(), (5, 1.0, 0.3)])
def test_cuts(rest):
    for cut in T.cuts(13):
        on = T.shard(0, cut)
        for a, c in itertools.product([None, T.shard(0)], [None, on, T.shard(0), T.shard(1)]):
            T.hold(fn(*rest), [q, p, f], [a, on, c], (len(cut),))
    for cut in T.cuts(9):
        for b in (None, T.shard(0)):
            T.hold(fn(*rest), [q, p, f], [T.shard(0, cut), b, b], (len(cut),))


@pytest.mark.parametrize("places", [
    ([Shard(0), Shard(0)], [Shard(0), Shard(0)], [Shard(0), Shard(0)]),
    ([Shard(0), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(1)]),
    ([Replicate(), Replicate()], [Shard(0), Replicate()], [Replicate(), Shard(0)]),
])  # fmt: skip
def test_mesh(places):
    T.hold(fn(), [q, p, f], [T.On(x) for x in places], (2, 2))


def test_at_the_points_themselves():
    """A query on a point gets its feature; its gradient in coordinates is finite."""
    T.hold(fn(), [p[:6], p, f], [T.shard(0), T.shard(0, (1, 12)), T.shard(0)], (2,))
    got = st.points.interpolate(p, p, f)
    assert torch.allclose(got, f, atol=1e-12)
    with pytest.raises(ValueError, match="features"):
        st.points.interpolate(q, p, f[:12])


def test_only_needed_rows_travel():
    """All queries of a rank near one point of the other: one row of features is fetched."""

    def sent():
        mesh = T.make_mesh((2,))
        x = torch.tensor([0.0, 10.0], dtype=D)[:, None]
        place = torch.cat([x[1] - torch.rand(5, 1, dtype=D), x[0] + torch.rand(5, 1, dtype=D)])
        features = torch.randn(2, 100, dtype=D)
        a, b, c = (
            st.distribute_tensor(y, mesh, [Shard(0)], src_data_rank=None)
            for y in (place, x, features)
        )
        with st.trace() as t:
            st.points.interpolate(a, b, c, 1)
        return sum(s.bytes for s in t.sent if s.collective == "take")

    assert st.simulate(2, sent) == [8 + 8 + 800] * 2

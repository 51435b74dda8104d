"""Farthest points of sharded clouds against the plain loop."""

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
cloud = torch.randn(13, 3, dtype=D)
grid = torch.cartesian_prod(*[torch.arange(4, dtype=D)] * 2)[torch.randperm(16)]


def serial(x, m, start):
    """The farthest from all chosen, of equals the lowest index, in Python."""
    x, chosen = x.detach(), [start][:m]
    while len(chosen) < m:
        far = [min(float(((a - x[c]) ** 2).sum()) for c in chosen) for a in x]
        chosen.append(max(range(len(x)), key=lambda i: (far[i], -i)))
    return torch.tensor(chosen, dtype=torch.int64)


def fn(m, start):
    def run(x):
        if isinstance(x, st.ShardTensor):
            return st.points.farthest_point_sampling(x, m, start)
        return serial(x, m, start)

    return run


@pytest.mark.parametrize("x", [cloud, grid], ids=["cloud", "grid"])
@pytest.mark.parametrize("m, start", [(0, 0), (1, 12), (6, 0), (13, 5)])
def test_equals_the_loop(x, m, start):
    got = st.points.farthest_point_sampling(x, m, start)
    assert type(got) is torch.Tensor and torch.equal(got, serial(x, m, start))
    for cut in T.cuts(len(x)):
        (spec,) = T.hold(fn(m, start), [x], [T.shard(0, cut)], (len(cut),))
        assert not spec.varying
    for on in (T.On([Shard(0), Shard(0)], {0: (0, len(x) - 4, 1, 3)}), T.On([Replicate(), Shard(0)]),
               T.On([Shard(0), Shard(1)])):  # fmt: skip
        T.hold(fn(m, start), [x], [on], (2, 2))


def test_fp32_and_equal_points():
    x = torch.cat([cloud, cloud[:3]]).float()
    assert torch.equal(st.points.farthest_point_sampling(x, 16, 1), serial(x, 16, 1))
    T.hold(fn(16, 1), [x], [T.shard(0, (2, 14))], (2,))


def test_cost_and_mistakes():
    def sent():
        x = st.distribute_tensor(cloud, T.make_mesh((3,)), [Shard(0)], src_data_rank=None)
        with st.trace() as t:
            st.points.farthest_point_sampling(x, 4)
        for m, start in ((14, 0), (2, 13), (2, -1), (-1, 0)):
            with pytest.raises(ValueError, match="of 13 points"):
                st.points.farthest_point_sampling(x, m, start)
        return t.bytes, len(t.sent)

    # the distance, 3 coordinates and the index of a candidate, to 2 ranks
    assert st.simulate(3, sent) == [(4 * 5 * 8 * 2, 4)] * 3

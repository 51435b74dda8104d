"""From each placement to each other, in value and gradient, and what that sends."""

import pytest
import torch
import torch.distributed as dist
from test_soundness import close, sample
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

D = torch.float64


def between_placements():
    n = dist.get_world_size()
    mesh = make_mesh((n,)) if n < 4 else init_device_mesh("cpu", (2, 2))
    x = sample().reshape(7, 3, 2)
    kinds = [Shard(0), Shard(1), Shard(2), Replicate(), Partial()]
    every = [[k] for k in kinds] if n < 4 else [[a, b] for a in kinds for b in kinds]
    for old in every:
        for new in every:
            whole = st.distribute_tensor(x, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
            leaf = whole.requires_grad_()
            a = leaf.redistribute(placements=old)
            assert a.placements == tuple(old)
            b = a.redistribute(placements=new)
            assert b.placements == tuple(new)
            close(b, x)
            (b.full_tensor() * x.sin()).sum().backward()
            close(leaf.grad, x.sin())


def moving_costs():
    """No path gathers: bytes of each move, of 8-byte numbers, on 4 ranks."""
    mesh = make_mesh((4,))
    x = torch.arange(4 * 4 * 4, dtype=D).reshape(4, 4, 4)
    s = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    r = s.redistribute(placements=[Replicate()])
    costs = []
    for a, place, sizes in [
        (s, Shard(1), None), (r, Shard(2), None), (s, Replicate(), None),
        (s, Shard(0), {0: (2, 0, 1, 1)}), (r.redistribute(placements=[Partial()]), Shard(0), None),
    ]:  # fmt: skip
        with st.trace() as t:
            b = a.redistribute(placements=[place], sizes=sizes)
        close(b, x)
        costs.append(t.bytes)
    return costs


def sends_slices_only():
    mesh = make_mesh((dist.get_world_size(),))
    x = sample(8) if dist.get_rank() == 0 else torch.zeros(8, 6, dtype=D)
    with st.trace() as t:
        s = st.distribute_tensor(x, mesh, [Shard(0)])
    close(s, sample(8))
    # before that one small message: whether all ranks have the same shape, dtype and format
    shapes, slices = t.sent
    assert (shapes.collective, slices.collective) == ("all_gather", "scatter")
    assert shapes.bytes == (t.sent[0].ranks - 1) * 17 * 8
    return slices.bytes


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_between_placements(n):
    st.simulate(n, between_placements)


def test_moving_costs():
    own, eight = 16 * 8, 8
    for rank, costs in enumerate(st.simulate(4, moving_costs)):
        swap, split, gather, recut, scatter = costs
        assert swap == 3 * 4 * eight and split == 0 and gather == 3 * own
        assert recut == (own if rank == 1 else 0)
        assert scatter == 3 * own


def test_distribute_sends_slices_only():
    assert st.simulate(4, sends_slices_only) == [6 * 6 * 8, 0, 0, 0]

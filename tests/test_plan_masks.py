"""Rows that a mask picks: one that every rank has, as a buffer of a model, tells them to all."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.plan.estimate import Layout, Task, estimate

ROWS = 13


class Wet(nn.Module):
    """Computes rows where a buffer says so."""

    def __init__(self):
        super().__init__()
        self.register_buffer("wet", torch.arange(ROWS) % 3 != 0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = x.new_zeros(x.shape)
        y[self.wet] = self.last(torch.relu(self.first(x)[self.wet]))
        return y + torch.masked_select(x, self.wet[:, None]).mean()


def sent(sizes):
    def step():
        mesh = T.make_mesh((len(sizes),))
        torch.manual_seed(0)
        model = st.parallelize(Wet(), mesh)
        x = st.distribute_tensor(torch.randn(ROWS, 4), mesh, [Shard(0)], sizes={0: sizes})
        with st.trace() as t:
            y = model(x)
            y.square().mean().backward()
        return y.spec.sizes, [(s.collective, s.bytes, s.messages) for s in t.sent]

    return st.simulate(len(sizes), step)


@pytest.mark.parametrize("sizes", [(7, 6), (5, 4, 4)])
def test_a_plan_knows_them(sizes):
    found = estimate(Task(Wet, [(ROWS, 4)], dims=(0,)), Layout(1, (0,), (len(sizes),)))
    assert not found.refused and not found.assumed
    said = [(s.collective, s.bytes, s.messages) for s in found.sent]
    assert said in [sent for _, sent in sent(sizes)]


def test_a_plan_of_one_rank_knows_them():
    found = estimate(Task(Wet, [(ROWS, 4)], dims=(0,)), Layout(1, (0,), (1,)))
    assert not found.refused and not found.assumed


@pytest.mark.parametrize("cut", T.cuts(7))
@pytest.mark.parametrize("flat", [False, True])
def test_nobody_asks_for_them(cut, flat):
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    mask = mask if not flat else mask[:, None] & torch.tensor([True, False, True])
    x, v = torch.randn(7, 3, 2).double(), torch.randn(int(mask.sum()), *(3, 2)[flat:]).double()

    def picked(x):
        return x[mask]

    def put(x, v):
        y = x * 2
        y[mask] = v
        return y

    T.hold(picked, [x], [T.shard(0, cut)], (len(cut),))
    T.hold(put, [x, v], [T.shard(0, cut), None], (len(cut),))

    def messages():
        mesh = T.make_mesh((len(cut),))
        y = st.distribute_tensor(x, mesh, [Shard(0)], sizes={0: cut})
        with st.trace() as t:
            picked(y)
        return len(t.sent)

    assert st.simulate(len(cut), messages) == [0] * len(cut)

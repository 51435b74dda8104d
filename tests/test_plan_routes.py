"""A plan of message passing is of a step that has its routes."""

import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.plan.estimate import Layout, Task, estimate


class Edges(nn.Module):
    """Messages along edges that a buffer has, found once in training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("edges", torch.arange(48).view(2, 24) * 7 % 12)
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        source, target = self.edges
        for _ in range(2):
            x = x + torch.zeros_like(x).index_add(0, target, self.layer(x)[source])
        return x


def test_a_step_has_the_routes_that_the_first_one_found(plain_transport):
    def step():
        mesh = T.make_mesh((2,))
        model = st.parallelize(Edges(), mesh)
        x = st.distribute_tensor(torch.randn(12, 4), mesh, [Shard(0)])
        for _ in range(2):
            with st.trace() as t:
                model(x).square().mean().backward()
        return [s.collective for s in t.sent]

    found = estimate(Task(Edges, [(12, 4)], dims=(0,)), Layout(1, (0,), (2,)))
    assert [s.collective for s in found.sent] == st.simulate(2, step)[0]

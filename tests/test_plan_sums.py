"""A plan holds no more than a run where autograd adds up the gradients of a tensor."""

import pytest
import torch
from torch import nn

from shardtensor.plan.estimate import Layout, Task, estimate
from shardtensor.ranks.measure import peak_bytes


class Read(nn.Module):
    """Reads a tensor several times; backward makes a gradient of its size for each."""

    def __init__(self, times):
        super().__init__()
        self.times, self.scale = times, nn.Parameter(torch.ones(16))

    def forward(self, x):
        h = x * self.scale
        return sum(h.narrow(0, i, 8).sum() for i in range(self.times))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_sums_of_gradients_are_made_in_place(times):
    model, x = Read(times), torch.rand(4096, 16)

    def step():
        model(x).backward()
        model.scale.grad = None

    step()
    task = Task(lambda: Read(times), [(4096, 16)], dims=(0,), loss=lambda out: out)
    planned = estimate(task, Layout(1, (0,), (1,))).peak
    assert planned == pytest.approx(x.nbytes + peak_bytes(step), rel=0.01)

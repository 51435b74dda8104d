"""A plan refuses operands of unlike dtypes where one device does, which fake tensors pass over."""

import pytest
import torch
from torch import nn

from shardtensor.plan.estimate import Layout, Task, estimate
from shardtensor.train.options import Options


class Added(nn.Module):
    """Under autocast messages are in bf16, what they are added to is not."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, x, at):
        return torch.zeros(len(x), 8).index_add(0, at, self.layer(x))


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 4).bfloat16()

    def forward(self, x):
        return self.last(self.first(x))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("make, more", [(Added, [torch.arange(16)]), (Halves, [])])
def test_as_on_one_device(make, more, precision, ranks):
    layout = Layout(1, (0,), (ranks,), Options(precision=precision))
    found = estimate(Task(make, [(16, 4), *more], dims=(0,)), layout)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
            make()(torch.randn(16, 4), *more)
    except RuntimeError:
        assert "RuntimeError" in found.refused and "test_plan_dtypes.py" in found.refused
    else:
        assert not found.refused

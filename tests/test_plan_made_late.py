"""Plans of models whose weights the first forward makes, and that give dataclasses."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import shardtensor as st

Pair = namedtuple("Pair", "mean spread")


@dataclass
class Out:
    parts: list
    count: int


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyConv2d(4, 3, padding=1), nn.LazyBatchNorm2d())

    def forward(self, x):
        return self.net(x)


class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = None

    def forward(self, x):
        self.net = self.net or nn.Conv2d(x.shape[1], 2, 3, padding=1)
        return self.net(x)


class Told(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = self.net(x)
        return Out([Pair(y.mean(1), {"var": y.var(1)})], 3)


def planned(make):
    return st.plan(make, [(2, 3, 16, 12)], 2, precisions=[None])


@pytest.mark.parametrize(("model", "told"), [(Lazy, "net.0.weight is made"), (Late, "no weights")])
def test_weights_that_the_first_forward_makes(model, told):
    assert all(told in e.refused and "call it once" in e.refused for e in planned(model))

    def make():
        made = model()
        made(torch.zeros(2, 3, 4, 4))
        return made

    found = planned(make)
    assert found and not any(e.refused for e in found)
    assert all(e.memory["parameters"] for e in found)


def test_the_loss_is_of_tensors_in_dataclasses_and_named_tuples():
    found = planned(Told)
    assert len(found) == 3 and not any(e.refused for e in found)
    assert all(e.memory["parameters"] == 4 * (81 + 3) for e in found)

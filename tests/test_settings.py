"""strategy, fallback and match_single_device reach a checkpoint's recomputation, in any thread."""

import threading

import pytest
import torch
from torch import nn
from torch.distributed import _composable as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import Shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor import attention
from shardtensor.dispatch.fallback import limit
from shardtensor.ranks.testing import make_mesh

X = torch.linspace(-1, 1, 48, dtype=torch.float64).view(4, 12)


def placed(ranks):
    x = st.distribute_tensor(X, make_mesh((ranks,)), [Shard(1)], src_data_rank=None)
    return x.requires_grad_()


def recomputed(reentrant, elsewhere):
    """What is in force in forward and in the recomputation, which other contexts surround."""
    seen, x = [], placed(1 if elsewhere else 2)

    def part(y):
        seen.append((attention.chosen(), limit(), st.random.matching()))
        return F.dropout(y, 0.5).sin()

    torch.manual_seed(1)
    with attention.strategy("ring"), st.fallback("error"), st.random.match_single_device():
        loss = checkpoint(part, x, use_reentrant=reentrant).square().sum()
    with attention.strategy("all_to_all"):
        if elsewhere:
            run = threading.Thread(target=loss.to_local().backward)
            run.start()
            run.join()
        else:
            loss.backward()
        assert attention.chosen() == "all_to_all"
    return seen, x.grad.full_tensor()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_recomputation_has_the_settings_of_its_forward(reentrant, elsewhere):
    torch.manual_seed(1)
    x = X.clone().requires_grad_()
    F.dropout(x, 0.5).sin().square().sum().backward()
    for seen, grad in st.simulate(1 if elsewhere else 2, recomputed, reentrant, elsewhere):
        assert seen == [("ring", -1, True)] * 2
        assert torch.allclose(grad, x.grad, rtol=1e-12)


class Seeing(nn.Module):
    """Notes the settings of each of its calls."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12, dtype=X.dtype)
        self.seen = []

    def forward(self, x):
        self.seen.append((attention.chosen(), limit(), st.random.matching()))
        return self.linear(x).sin()


def wrapped(model, mesh):
    model[0] = checkpoint_wrapper(model[0])


def composed(model, mesh):
    composable.checkpoint(model[0])


def parallel(model, mesh):
    st.parallelize(model, mesh, checkpoint=True, blocks=["Seeing"])


def recomputed_by(way):
    torch.manual_seed(0)
    block, mesh = Seeing(), make_mesh((2,))
    model = nn.Sequential(block)
    way(model, mesh)
    x = st.distribute_tensor(X, mesh, [Shard(0)], src_data_rank=None).requires_grad_()
    with attention.strategy("ring"), st.fallback("error"), st.random.match_single_device():
        loss = model(x).square().sum()
    loss.backward()
    return block.seen


@pytest.mark.parametrize("way", [wrapped, composed, parallel])
def test_every_way_to_a_checkpoint(way):
    assert st.simulate(2, recomputed_by, way) == [[("ring", -1, True)] * 2] * 2

"""What backward needs and was written to: all ranks raise as one device does, those without rows, too."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

D = torch.float64
KERNEL = torch.ones(3, 3, 2, dtype=D)
OPS = {
    "amax": lambda x: x.amax(1),
    "max": lambda x: x.max(),
    "cumprod": lambda x: x.cumprod(1),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "var": lambda x: x.var(1),
    "inf norm": lambda x: x.norm(p=float("inf"), dim=1),
    "layer_norm": lambda x: F.layer_norm(x, (3,)),
    "rms_norm": lambda x: F.rms_norm(x, (3,)),
    "conv": lambda x: F.conv1d(x.mT, KERNEL),
    "max_pool": lambda x: F.max_pool1d(x.mT, 2),
    "avg_pool": lambda x: F.avg_pool1d(x.mT, 2),
}


def written(op, place):
    x = place(torch.linspace(0.5, 1.5, 60, dtype=D).view(4, 5, 3)).requires_grad_() * 1.0
    y = OPS[op](x).sum()
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("op", OPS)
def test_all_ranks_raise(op):
    written(op, lambda x: x)
    sizes = (5, 0)

    def place(x):
        return st.distribute_tensor(
            x, make_mesh((2,)), [Shard(1)], src_data_rank=None, sizes={1: sizes}
        )

    st.simulate(2, written, op, place)


def test_a_rank_without_outputs():
    """Whose neighbours read nothing of it: it pools a row that stands for none of its own."""
    x = torch.linspace(0.5, 1.5, 60, dtype=D).view(4, 5, 3)

    def place(x):
        return st.distribute_tensor(
            x, make_mesh((3,)), [Shard(1)], src_data_rank=None, sizes={1: (2, 0, 3)}
        )

    st.simulate(3, written, "max_pool", place)
    x.requires_grad_()
    F.max_pool1d(x.mT, 2).square().sum().backward()

    def gradient():
        own = place(x.detach()).requires_grad_()
        F.max_pool1d(own.mT, 2).square().sum().backward()
        return own.grad.full_tensor()

    for got in st.simulate(3, gradient):
        assert torch.equal(got, x.grad)

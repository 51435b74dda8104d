"""Vector norms over shards: values, gradients and second derivatives at zeros, NaN and ties, as torch's."""

import math

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, same

ORDERS = (-math.inf, -2, -0.5, 0.5, 1, 1.5, 2, 2.5, 3, 4, math.inf)


def _samples():
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    zeros = x.clone()
    zeros[1] = zeros[:, 2] = zeros[2, 3] = 0
    nan = zeros.clone()
    nan[3, 0] = math.nan
    return {"numbers": x, "zeros": zeros, "NaN": nan, "nothing else": x * 0, "ties": x.sign()}


def _derivatives(x, order, dim):
    """The norm and its derivatives of two orders."""
    y = torch.linalg.vector_norm(x, order, dim)
    weight = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).reshape(y.shape)
    (g,) = torch.autograd.grad((y * weight).sum(), x, create_graph=True)
    if not g.requires_grad:
        return [y, g]
    weight = torch.linspace(0.7, 1.7, 20, dtype=torch.float64).reshape(5, 4)
    (h,) = torch.autograd.grad((g * weight).sum(), x, materialize_grads=True, allow_unused=True)
    return [y, g, h]


@pytest.mark.parametrize("name", _samples())
@pytest.mark.parametrize(("cut", "d"), [((2, 2, 1, 0), 0), ((2, 0, 2), 1)])
def test_derivatives_of_every_order(name, cut, d):
    x = _samples()[name]

    def run():
        mesh = make_mesh((len(cut),))
        for order in ORDERS:
            for dim in (None, 0, 1):
                whole = x.clone().requires_grad_()
                y = st.distribute_tensor(x, mesh, [Shard(d)], src_data_rank=None, sizes={d: cut})
                found = _derivatives(y.requires_grad_(), order, dim)
                for got, want in zip(found, _derivatives(whole, order, dim), strict=False):
                    same(got.full_tensor(), want, f"{order} along {dim}", 1e-9, 1e-12)

    st.simulate(len(cut), run)


def test_a_large_order_of_one_number():
    x = torch.tensor([[-2.0, 0.5, 0.0]], dtype=torch.float64)

    def run():
        y = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        for order in (2**40, 1e300, -(2**40)):
            want = torch.linalg.vector_norm(x, order, 0)
            same(torch.linalg.vector_norm(y, order, 0).full_tensor(), want, "norm")

    st.simulate(2, run)

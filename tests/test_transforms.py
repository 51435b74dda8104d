"""torch.func transforms and forward mode are refused; torch.autograd.functional works."""

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import hold, make_mesh, shard


def _dual(x):
    with fw.dual_level():
        return fw.unpack_dual(fw.make_dual(x, x).sin()).tangent


def _captured(x):
    with fw.dual_level():
        one = torch.ones(())
        return fw.unpack_dual(fw.make_dual(one, one) * x).tangent


REFUSED = {
    "vmap": lambda x: torch.func.vmap(torch.sin)(x),
    "vmap of a closure": lambda x: torch.func.vmap(lambda a: a + x)(torch.ones(3)),
    "jvp": lambda x: torch.func.jvp(torch.sin, (x,), (x,)),
    "vjp": lambda x: torch.func.vjp(torch.sin, x),
    "grad": lambda x: torch.func.grad(lambda a: a.sin().sum())(x),
    "grad of a closure": lambda x: torch.func.grad(lambda a: (a * x).sum())(torch.ones(())),
    "jacrev": lambda x: torch.func.jacrev(torch.sin)(x),
    "jacfwd": lambda x: torch.func.jacfwd(torch.sin)(x),
    "dual": _dual,
    "captured": _captured,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(name):
    def run():
        x = st.distribute_tensor(torch.ones(4), make_mesh((2,)), [Shard(0)])
        with pytest.raises(st.UnsupportedOpError, match=r"torch\.func"):
            REFUSED[name](x)
        assert (x * 2).full_tensor().sum() == 8  # nothing is left switched on

    st.simulate(2, run)


def test_autograd_functional():
    x = torch.randn(5, dtype=torch.float64)

    def jvp(x):
        return torch.autograd.functional.jvp(lambda a: a**3, x, x * 0 + 2, create_graph=True)[1]

    hold(jvp, [x], [shard(0, (2, 0, 3))], (3,))

"""mambapy's scan on a sharded sequence; the package is not here, and a plain loop stands for it."""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

import pytest
import torch
from torch.distributed.tensor import Partial, Shard

import shardtensor as st
from shardtensor import testing as T

D = torch.float64


class Scan(torch.autograd.Function):
    """States of h[t] = A[t] h[t - 1] + X[t], written in place; it needs the whole sequence."""

    @staticmethod
    def forward(ctx, A_in, X_in):
        x = X_in.clone()
        assert not (isinstance(x, st.ShardTensor) and x.spec.dims[1].is_cut)
        for t in range(1, x.shape[1]):
            x[:, t].add_(A_in[:, t].mul(x[:, t - 1]))
        ctx.save_for_backward(A_in, x)
        return x

    @staticmethod
    def backward(ctx, g):
        a, x = ctx.saved_tensors
        g = g.clone()
        for t in range(x.shape[1] - 2, -1, -1):
            g[:, t].add_(a[:, t + 1].mul(g[:, t + 1]))
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return g * before, g


class Package(Loader, MetaPathFinder):
    def find_spec(self, name, path, target=None):
        found = name in ("mambapy", "mambapy.pscan")
        return ModuleSpec(name, self, is_package=name == "mambapy") if found else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        if module.__name__ == "mambapy.pscan":
            module.PScan, module.pscan = Scan, Scan.apply


@pytest.fixture(scope="module")
def pscan():
    finder = Package()
    sys.meta_path.append(finder)
    try:
        yield __import__("mambapy.pscan", fromlist=["_"]).pscan
    finally:
        sys.meta_path.remove(finder)
        for m in ("mambapy", "mambapy.pscan"):
            sys.modules.pop(m, None)


LAYOUTS = [
    ([T.shard(1), T.shard(1)], (2,)),
    ([T.shard(1, (5, 0, 2)), T.shard(1, (1, 6, 0))], (3,)),
    ([T.shard(1), None], (3,)),
    ([T.On([Shard(1), Shard(2)])] * 2, (2, 2)),
    ([T.On([Shard(1), Shard(1)])] * 2, (2, 2)),
    ([T.shard(1), T.shard(0)], (2,)),
    ([T.shard(2), T.shard(1)], (4,)),
    ([T.On([Partial()]), T.shard(1)], (2,)),
    ([T.shard(3), T.shard(3)], (2,)),
]


@pytest.mark.parametrize("places, mesh", LAYOUTS)
def test_values_and_gradients(pscan, places, mesh):
    g = torch.Generator().manual_seed(0)
    args = [torch.randn(2, 7, 4, 3, dtype=D, generator=g) for _ in "ax"]
    T.hold(lambda a, x: pscan(a.sigmoid(), x * 2), args, places, mesh)


def test_what_is_sent(pscan):
    """Each operand and the result once, each way, but for what stays: half of a rank's share."""

    def sent():
        x = torch.ones(1, 8, 4, 2)
        x = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(1)], src_data_rank=None)
        with st.trace() as t:
            y = pscan(x, x)
        assert y.spec == x.spec
        return t.bytes / x.to_local().nbytes

    assert st.simulate(2, sent) == [1.5, 1.5]

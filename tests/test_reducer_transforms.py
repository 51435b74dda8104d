"""Weights of parallelize under torch.func: their gradients are summed at once, once."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_reducer import same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

D = torch.float64


class Both(nn.Module):
    """A layer in vmap and outside of it, and an ensemble of stacked weights."""

    def __init__(self, members=3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.members = nn.ModuleList(nn.Linear(4, 4) for _ in range(members))

    def forward(self, x):
        x = torch.vmap(lambda row: F.linear(row, self.weight))(x) + F.linear(x, self.weight).sin()
        if not self.members:
            return x
        weights, _ = torch.func.stack_module_state(list(self.members))

        def one(given):
            return torch.func.functional_call(self.members[0], given, (x,))

        return torch.vmap(one)(weights).sin().sum(0)


def gradients(members, shape=(), **options):
    torch.manual_seed(0)
    model, x = Both(members).double(), torch.randn(2, 5, 4, dtype=D)
    if shape:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "domain")[-len(shape) :])
        st.parallelize(model, mesh, data="data" if len(shape) > 1 else None, **options)
        d = mesh.get_local_rank("data") if len(shape) > 1 else 0
        x = x[d : d + 1] if len(shape) > 1 else x
        x = st.distribute_tensor(x, mesh["domain"], [Shard(1)], src_data_rank=None)
    model(x).square().mean().backward()
    found = {k: p.grad for k, p in model.named_parameters()}
    return {k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in found.items()}


@pytest.mark.parametrize(
    "members, shape, options",
    [(3, (2,), {}), (3, (3,), {}), (3, (2, 2), {}), (0, (2,), {"fsdp": "all"})],
)
def test_gradients(members, shape, options):
    want, ranks = gradients(members), math.prod(shape)
    for got in st.simulate(ranks, lambda: gradients(members, shape, **options)):
        same(got, want)


def test_a_plan_has_it():
    for e in st.plan(Both, [(2, 6, 4)], 2, dims=(1,), precisions=(None,)):
        assert not e.refused, e


def test_a_compiled_program_refuses_it():
    def run():
        x = st.distribute_tensor(torch.randn(2, 6, 4), make_mesh((2,)), [Shard(1)])
        with pytest.raises(st.UnsupportedOpError, match=r"torch\.func around ops"):
            st.compile(Both(), backend="eager", fullgraph=True)(x)

    st.simulate(2, run)


def test_a_trace_notes_what_is_in_a_batch():
    def run():
        x = st.distribute_tensor(torch.randn(2, 6, 4), make_mesh((2,)), [Shard(1)])
        model = Both()
        with st.trace(model=model) as t:
            model(x)
        return [s.origin.kind for s in t.whole().shares]

    assert set(st.simulate(2, run)[0]) == {"parameter"}

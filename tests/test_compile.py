"""The compiled local program gives the values and gradients of the eager one, in one graph."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import UNet, ViT
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.testing import make_mesh, run_workers


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)

    def forward(self, x):
        return (x + self.down(F.gelu(self.up(x)))).softmax(-1) - x.mean(1, keepdim=True)


def trained(net, x, fn):
    net.zero_grad()
    y = fn(x)
    y.square().mean().backward()
    return [y, x.grad, *(p.grad for p in net.parameters())]


def eager_and_compiled(make, shape, dim, backend):
    mesh = make_mesh((dist.get_world_size(),))
    net = make()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    compiled_net = copy.deepcopy(net)
    want = trained(net, r := x.clone().requires_grad_(), net)
    del r
    compiled = st.compile(compiled_net, backend=backend, fullgraph=True)
    for _ in range(2):
        s = st.distribute_tensor(x, mesh, [Shard(dim)], src_data_rank=None).requires_grad_()
        got = trained(compiled_net, s, compiled)
        for g, w in zip(got, want, strict=True):
            g = g.full_tensor() if isinstance(g, st.ShardTensor) else g
            assert torch.allclose(g, w, rtol=1e-4, atol=1e-6), (g - w).abs().max()
    assert compiled.traces == 1
    with torch.no_grad():
        compiled(s)
    assert compiled.traces == 2
    uneven = s.detach().redistribute(placements=[Shard(dim)], sizes={dim: (shape[dim] - 1, 1)})
    with torch.no_grad():
        got = compiled(uneven)
    assert compiled.traces == 3 and got.shape == want[0].shape
    assert torch.allclose(got.full_tensor(), want[0], rtol=1e-4, atol=1e-6)


def test_traced_graph():
    st.simulate(2, eager_and_compiled, Mlp, (2, 7, 6), 1, "aot_eager")


@pytest.mark.gloo
def test_inductor():
    run_workers(2, eager_and_compiled, Mlp, (2, 7, 6), 1, "inductor")


def unet():
    torch.manual_seed(0)
    return UNet(2, 1, width=4, depth=1, periodic=True)


def vit():
    torch.manual_seed(0)
    return ViT((16, 12), 4, 2, 1, width=16, depth=1, heads=2)


@pytest.mark.parametrize("make", [unet, vit])
def test_whole_models(make):
    st.simulate(2, eager_and_compiled, make, (2, 2, 16, 12), 2, "aot_eager")

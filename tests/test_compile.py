"""The compiled local program gives the values and gradients of the eager one, in one graph."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import UNet, ViT
from torch import nn
from torch.distributed.tensor import Shard
from torch.profiler import record_function

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, run_workers, same


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


def eager_and_compiled(make, shape, dim, backend, others=True):
    """others: also without gradients, and of shards of other sizes, which are traced anew."""
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
    if not others:
        return
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


class Named(Mlp):
    def forward(self, x):
        with record_function("all"):
            y = super().forward(x)
            with record_function("inner"):
                return y * 2


def test_names_for_the_profiler():
    st.simulate(2, eager_and_compiled, Named, (2, 7, 6), 1, "aot_eager", False)


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
@pytest.mark.slow
def test_whole_models(make):
    st.simulate(2, eager_and_compiled, make, (2, 2, 16, 12), 2, "aot_eager", make is vit)


def bounded():
    compiled = st.compile(lambda x: x * 2, backend="eager")
    compiled.most = 2
    mesh = make_mesh((2,))
    x = torch.arange(12.0).view(6, 2)

    def sharded(*sizes):
        return st.distribute_tensor(x, mesh, [Shard(0)], sizes={0: sizes}, src_data_rank=None)

    for sizes in ((3, 3), (4, 2), (3, 3), (5, 1), (3, 3), (4, 2)):
        assert torch.equal(compiled(sharded(*sizes)).full_tensor(), x * 2)
    return compiled.traces, len(compiled.traced)


def test_the_number_of_graphs_is_bounded(caplog):
    with caplog.at_level("INFO", logger="shardtensor.compile"):
        # the third graph drops the second, which is then made again
        assert st.simulate(2, bounded) == [(4, 2)] * 2
    text = [r.getMessage() for r in caplog.records]
    assert any("specs" in m and "[4, 2]" in m and "->" in m for m in text)
    assert sum(r.levelname == "WARNING" for r in caplog.records) == 2


def stock(net, x):
    return torch.compile(net)(x)


def under_torch_compile():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU())
    x = torch.randn(1, 3, 8, 6)
    s = st.distribute_tensor(x, make_mesh((2,)), [Shard(2)], src_data_rank=None)
    # at the time of tracing, in whichever rank traces
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        y = stock(net, s)
    y.square().mean().backward()
    got = net[0].weight.grad.clone()
    net.zero_grad()
    want = net(x)
    want.square().mean().backward()
    assert torch.allclose(y.full_tensor(), want, rtol=1e-5)
    assert torch.allclose(got, net[0].weight.grad, rtol=1e-4)
    return [str(w.message) for w in seen]


@pytest.mark.gloo
def test_stock_compile_runs_eagerly_and_says_what_to_call():
    for found in run_workers(2, under_torch_compile):
        assert any("shardtensor.compile(model)" in m for m in found)


class Steps(nn.Module):
    """A recurrence over a sharded dim, whose steps are gathered one by one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        x, h, steps = self.first(x), 0.0, []
        for i in range(x.shape[1]):
            h = torch.tanh(h + x[:, i])
            steps.append(h)
        return torch.stack(steps, 1)


@pytest.mark.parametrize("sizes", [(3, 3), (4, 0, 2)])
@pytest.mark.parametrize("train", [True, False])
def test_gathers_of_ranks_that_have_nothing_to_give_stay_apart(sizes, train):
    """Their arguments are equal on such a rank: one call may not stand for two."""
    torch.manual_seed(0)
    model, x = Steps().double(), torch.randn(2, 6, 4, dtype=torch.float64)
    model.requires_grad_(train)
    want = model(x)
    grads = torch.autograd.grad(want.square().sum(), [model.first.weight]) if train else []

    def step():
        mesh = make_mesh((len(sizes),))
        twin = copy.deepcopy(model)
        given = st.distribute_tensor(x, mesh, [Shard(1)], sizes={1: sizes})
        y = st.compile(twin, backend="aot_eager")(given)
        same(y.full_tensor().detach(), want.detach(), "y", 1e-12)
        if train:
            y.square().sum().backward()
            same(twin.first.weight.grad, grads[0], "gradient", 1e-9)

    st.simulate(len(sizes), step)

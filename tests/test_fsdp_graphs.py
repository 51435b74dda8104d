"""Graphs of gradients under FSDP2: gradients of gradients are one device's, those of weights refused."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, simulate

D = torch.float64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


def made(blocks=2):
    torch.manual_seed(0)
    net = nn.Sequential(*[Block() for _ in range(blocks)], nn.Linear(3, 5)).to(D)
    return net, torch.randn(2, 8, 3, dtype=D)


def sharded(data, blocks=2):
    net, x = made(blocks)
    mesh = make_mesh((2, 2) if data else (2,), names=("data", "domain") if data else ("domain",))
    how = {"data": "data", "fsdp": "data"} if data else {"fsdp": "all"}
    st.parallelize(net, mesh, blocks=("Block",) if blocks else (), **how)
    return net, st.distribute_tensor(x, mesh["domain"], [Shard(1)], src_data_rank=None)


def gradient(net, x, power=2):
    x = x.detach().requires_grad_()
    y = net(x).pow(power).sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    return x, y, g


def penalty(net, x):
    _, y, g = gradient(net, x)
    (y + g.square().sum()).backward()


def linear(net, x):
    """No module's result leads to the loss."""
    gradient(net, x, 1)[2].square().sum().backward()


def inside(net, x):
    """What enters the model needs no gradient."""
    seen = []
    hook = net[0].register_forward_hook(lambda m, i, out: seen.append(out))
    y = net(x).square().sum()
    hook.remove()
    (g,) = torch.autograd.grad(y, seen, create_graph=True)
    (y + g.square().sum()).backward()


def several(net, x):
    """Other calls of the model, with and without gradients, before the backward of all."""
    _, y, g = gradient(net, x)
    _, z, h = gradient(net, 2 * x)
    with torch.no_grad():
        net(x)
    (y + z + net(x).sum() + g.square().sum() + h.square().sum()).backward()


def third(net, x):
    x, _, g = gradient(net, x)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    h.square().sum().backward()


def unused(net, x):
    """A graph that no backward follows, and a step after it."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    net(x).square().sum().backward()
    gradient(net, x)
    optimizer.step()
    penalty(net, x)


def kept(net, x):
    net(x).square().sum().backward(create_graph=True)


@pytest.mark.parametrize("data", [False, True], ids=["all", "data"])
@pytest.mark.parametrize("step", [penalty, linear, inside, several, third, unused, kept])
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_of_gradients(step, data):
    blocks = 0 if step is linear else 2

    def found(net, x):
        step(net, x)
        return [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in net.parameters()]

    want = found(*made(blocks))
    for got in simulate(4 if data else 2, lambda: found(*sharded(data, blocks))):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fsdp", [{}, {"fsdp": "all"}], ids=["plain", "fsdp"])
def test_checkpoints_are_computed_again_in_each_backward(fsdp):
    def on_rank():
        net, x = made()
        mesh = make_mesh((2,))
        st.parallelize(net, mesh, blocks=("Block",), checkpoint=True, **fsdp)
        penalty(net, st.distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None))
        return [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in net.parameters()]

    net, x = made()
    penalty(net, x)
    for got in simulate(2, on_rank):
        torch.testing.assert_close(got, [p.grad for p in net.parameters()], rtol=1e-9, atol=1e-12)


def test_weights_are_free_again():
    def on_rank():
        net, x = sharded(False)
        sizes = []
        for step in (gradient, penalty):
            step(net, x)
            sizes.append(sum(p.numel() for p in net.parameters() if hasattr(p, "full_tensor")))
        return sizes

    whole = sum(p.numel() for p in made()[0].parameters())
    assert simulate(2, on_rank) == [[0, whole]] * 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", ["grad", "backward"])
def test_gradients_of_weights_are_refused(way, when):
    def on_rank():
        net, x = sharded(False)
        early = list(net.parameters())
        y = net(x).square().sum()
        weights = early if when == "before" else list(net.parameters())
        with pytest.raises(st.UnsupportedOpError, match=r"of .*weight.*call backward\(\) and read"):
            torch.autograd.grad(y, weights) if way == "grad" else y.backward(inputs=weights)
        y.backward()
        return [p.grad.full_tensor() for p in net.parameters()]

    net, x = made()
    net(x).square().sum().backward()
    for got in simulate(2, on_rank):
        torch.testing.assert_close(got, [p.grad for p in net.parameters()], rtol=1e-9, atol=1e-12)

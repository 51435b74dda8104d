"""What a compiled call is given: tensors given twice, tied weights; its cost without the graph."""

import sys

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

D = torch.float64


def whole(x):
    return x.full_tensor() if isinstance(x, st.ShardTensor) else x


def close(found, want):
    for f, w in zip(found, want, strict=True):
        if w is None:
            # torch's compiler gives zeros where eager calls give None
            assert f is None or not f.to_local().any()
        else:
            torch.testing.assert_close(whole(f), w, rtol=1e-9, atol=1e-12)


def placed(x, sizes=(4, 2)):
    mesh = make_mesh((len(sizes),))
    return st.distribute_tensor(x, mesh, [Shard(0)], sizes={0: sizes}, src_data_rank=None)


def alike(m, x, y, w=None):
    return m.a(x) * 2 + m.b(y).sin() if x is not y else m.a(x) - 1


def written(m, x, y, w=None):
    x.add_(1)
    return m.a(y) * y


def weights(m, x, y, w=None):
    return m.a(x) + y * (m.a.weight[0] if w is None else w[0])


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(4, 4, bias=False, dtype=D) for _ in range(2))
        self.body = body

    def forward(self, *args):
        return self.body(self, *args)


def of_pairs(net, call, place):
    """Calls with one tensor twice and with two of them, in turn; also with a weight of the module."""
    x = torch.randn(6, 4, dtype=D, generator=torch.Generator().manual_seed(1))
    found = []
    for i in (0, 1, 0, 1):
        for w in (None, net.a.weight, net.b.weight) if net.body is weights else (None,):
            a, b = (place(t.clone()).requires_grad_() for t in (x, x + 1))
            c = a * 1 if net.body is written else a
            net.zero_grad()
            y = call(c, (c, b)[i], *(() if w is None else (w,)))
            y.square().sum().backward()
            found += [y, a.grad, b.grad if i else a.grad, net.a.weight.grad.clone()]
    return found


@pytest.mark.parametrize("body", [alike, written, weights])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_tensor_given_twice(body, backend):
    # a graph of a call with one tensor twice took the second one for both
    net = Net(body)
    want = of_pairs(net, net, lambda x: x)

    def run():
        net = Net(body)
        close(of_pairs(net, st.compile(net, backend=backend, fullgraph=True), placed), want)

    st.simulate(2, run)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False, dtype=D) for _ in range(3))
        self.b.weight = self.a.weight
        self.again = self.c

    def forward(self, x):
        return self.again(self.c(torch.tanh(self.b(torch.sin(self.a(x))))))


def of_tied(net, call, place):
    """Steps; in between other layers are tied, so that there are as many weights of one form."""
    found = []
    for i in range(4):
        x = place(torch.linspace(-1, 1, 24, dtype=D).view(6, 4) + i)
        net.zero_grad()
        y = call(x)
        y.square().sum().backward()
        found += [y, *(p.grad.clone() for p in net.parameters())]
        if i == 1:
            net.b.weight = nn.Parameter(net.a.weight.detach() * 1.5)
            net.c.weight = net.a.weight
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.1)
    return found


@pytest.mark.parametrize("parallel", [False, True])
def test_tied_weights(parallel):
    net = Tied()
    want = of_tied(net, net, lambda x: x)

    def run():
        net = Tied()
        call = st.compile(net, backend="aot_eager", fullgraph=True)
        if parallel:
            st.parallelize(net, make_mesh((2,)))
        close(of_tied(net, call, placed), want)
        # they ran eagerly before: the second name seemed to be another parameter
        assert call.traces == 2

    st.simulate(2, run)


class Deep(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(n)
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def calls_of(n):
    net = Deep(n).eval()
    compiled = st.compile(net, backend="eager")
    x = placed(torch.ones(6, 4), (6,))
    with torch.no_grad():
        for _ in range(3):
            y = compiled(x)
        ((graph,),) = compiled.traced.values()
        local, count = [y.to_local()], 0
        graph.run = lambda *given: local

        def profile(frame, event, arg):
            nonlocal count
            count += event == "call"

        sys.setprofile(profile)
        try:
            compiled(x)
        finally:
            sys.setprofile(None)
    return count


def test_no_python_runs_for_a_module_or_a_tensor():
    def run():
        assert calls_of(2) == calls_of(12)

    st.simulate(1, run)

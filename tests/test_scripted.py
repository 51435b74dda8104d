"""What torch.jit made, and C++ that works on the wrapper itself, train as on one device."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.nn import functional as F

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

F64 = torch.float64


def scale(x, w):
    return F.gelu(x) * w + x


@torch.jit.script
def scripted(x, w):
    return F.gelu(x) * w + x


@torch.jit.script
def calls_another(x, w):
    return scripted(x, w).softmax(-1) * w.sum()


@torch.jit.script
def writes(x, w):
    y = (x * w).clone()
    y[1] = 3.0
    y += x.mean(0, keepdim=True)
    return y


@torch.jit.script
def with_defaults(x, w, k: float = 2.0, n: int = 3):
    return [x * w * k, x.cumsum(0) ** n][0] + n


@torch.jit.ignore
def left_to_python(x):
    return x * x.shape[0]


@torch.jit.script
def ignoring(x, w):
    return left_to_python(x) * w


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(4, 4, dtype=F64)
        self.norm = nn.BatchNorm1d(4, dtype=F64)
        self.register_buffer("scale", torch.linspace(0.5, 2, 4, dtype=F64))

    def forward(self, x: torch.Tensor, w: torch.Tensor, k: float = 1.5):
        if x.shape[0] > 2:
            x = self.norm(self.up(x)) * self.scale
        return x * w * k + x.std(0)


X, W = torch.randn(6, 4, dtype=F64, generator=torch.manual_seed(1)), torch.rand(4, dtype=F64)


PROGRAMS = {
    "scripted": lambda: scripted,
    "calls another": lambda: calls_another,
    "writes": lambda: writes,
    "defaults": lambda: with_defaults,
    "keywords": lambda: lambda x, w: with_defaults(x, n=2, w=w),
    "ignore": lambda: ignoring,
    "traced function": lambda: torch.jit.trace(scale, (X, W)),
    "scripted module": lambda: torch.jit.script(Layer()),
    "scripted module with keywords": lambda: (m := torch.jit.script(Layer())) and Both(m),
    "traced module": lambda: torch.jit.trace(Layer(), (X, W)),
}


class Both(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, w):
        return self.inner(x, k=0.5, w=w) + self.inner(w=w, x=x)


def trained(make, place, times=4):
    """The outputs and gradients of several calls: TorchScript optimises after the first ones."""
    fn, w, found = make(), W.clone().requires_grad_(), []
    parameters = [w, *(fn.parameters() if isinstance(fn, nn.Module) else [])]
    for _ in range(times):
        x = place(X).requires_grad_()
        y = fn(x, w)
        assert y.requires_grad
        grads = torch.autograd.grad(y.square().sum(), [x, *parameters])
        found.append([y, *grads])
    return found


def on_ranks(make):
    mesh = make_mesh((2,))
    found = trained(make, lambda x: st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None))
    return [[t.full_tensor() if isinstance(t, st.ShardTensor) else t for t in f] for f in found]


@pytest.mark.parametrize("name", PROGRAMS)
def test_scripted_programs_train(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = trained(PROGRAMS[name], lambda x: x.clone())
        got = st.simulate(2, on_ranks, PROGRAMS[name])
    for rank in got:
        for ours, theirs in zip(rank, want, strict=True):
            for g, w in zip(ours, theirs, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def below_overrides(mesh):
    w = W.clone().requires_grad_()
    x = st.distribute_tensor(X, mesh, [Shard(0)], src_data_rank=None).requires_grad_()
    with torch._C.DisableTorchFunctionSubclass():
        # as a C++ extension calls at::mul on what it was given
        y = x * w
    (y * y).sum().backward()
    return y.full_tensor(), x.grad.full_tensor(), w.grad


def test_ops_that_enter_in_cpp_record_gradients():
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    y = x * w
    y.square().sum().backward()
    for got in st.simulate(2, lambda: below_overrides(make_mesh((2,)))):
        for g, v in zip(got, (y, x.grad, w.grad), strict=True):
            torch.testing.assert_close(g, v, rtol=1e-9, atol=1e-12)

"""torch.func and forward mode in and around calls of `tiled`."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import shardtensor as st
from shardtensor.errors import UnsupportedOpError
from shardtensor.paged import pager


class Derived(nn.Module):
    """What a function of a convolution has for derivatives."""

    def __init__(self, of):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.of = nn.Conv2d(1, 2, 3, padding=1).double(), of

    def forward(self, x):
        return self.of(lambda x: self.conv(x).tanh(), x)


def total(f):
    return lambda x: f(x).square().sum()


DERIVATIVES = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "grad": lambda f, x: torch.func.grad(total(f))(x),
    # tangents begin as zeros that have no memory
    "a second one": lambda f, x: torch.func.jvp(torch.func.grad(total(f)), (x,), (x,))[1],
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_in_forward_are_paged(name, tmp_path, monkeypatch):
    monkeypatch.setattr(pager, "LEAST", 512)
    model, x = Derived(DERIVATIVES[name]), torch.randn(1, 1, 32, 8, dtype=torch.float64)
    run = st.tiled(model, 3, 2, memory=2**9, spill=tmp_path)
    found = []
    for call in (run, model):
        model.zero_grad()
        y = call(x)
        y.square().sum().backward()
        found.append([y, model.conv.weight.grad])
    assert run.paging.returned > 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_derivatives_of_a_call_are_refused(tmp_path):
    x = torch.randn(2, 1, 8, 4)
    run = st.tiled(nn.Conv2d(1, 2, 3, padding=1), 2, 2, memory=2**20, spill=tmp_path)
    for call in (
        lambda: torch.func.jvp(run, (x,), (x,)),
        lambda: torch.func.grad(lambda x: run(x).sum())(x),
        lambda: torch.vmap(run)(x[:, None]),
    ):
        with pytest.raises(UnsupportedOpError, match="around a call"):
            call()
    with forward_ad.dual_level():
        with pytest.raises(UnsupportedOpError, match="around a call"):
            run(forward_ad.make_dual(x, x))
        run(x)

"""`tiled` with gradients: parts that do not meet, made once more in backward."""

import copy
from functools import partial

import pytest
import test_tiled_alone
import torch
import torch.nn.functional as F
from test_tiled_alone import CASES, Net, conv, same
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor.paged import alone, files, pager, width


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Nearly everything is paged, and the rows made twice may be as many as those made."""
    monkeypatch.setattr(pager, "LEAST", 512)
    monkeypatch.setattr(width, "MORE", 2.0)
    monkeypatch.setattr(alone, "KEPT", 1e9)
    monkeypatch.setattr(files, "_free", lambda: 0)


def step(call, net, args, kwargs):
    """What a call and its backward leave: outputs, gradients, buffers, the next random number."""
    own, kwargs = copy.deepcopy((args, kwargs))
    given = [x for x in pytree.tree_leaves((own, kwargs)) if isinstance(x, torch.Tensor)]
    for x in given:
        x.requires_grad_(x.is_floating_point())
    net.zero_grad()
    torch.manual_seed(3)
    outputs = call(*own, **kwargs)
    drawn = torch.rand(2)
    learnt = [y for y in pytree.tree_leaves(outputs) if getattr(y, "requires_grad", False)]
    torch.manual_seed(4)
    torch.autograd.backward(learnt, [torch.rand(y.shape, dtype=y.dtype) for y in learnt])
    grads = [x.grad for x in (*given, *net.parameters())]
    return outputs, len(learnt), grads, list(net.buffers()), drawn


held = partial(test_tiled_alone.held, leaves=step)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_plain_model(name, tmp_path, monkeypatch):
    test_tiled_alone.held_apart(name, tmp_path, monkeypatch, step)


class Rows(nn.Module):
    """Parameters for every row, and for some; outputs that are not cut, one without a gradient."""

    def __init__(self):
        super().__init__()
        self.conv, self.frozen = conv(2, 3), conv(3, 3).requires_grad_(False)
        self.rows, self.few = (
            nn.Parameter(torch.randn(30, 1)),
            nn.Parameter(torch.randn(1, 3, 5, 1)),
        )

    def forward(self, x, z):
        y = self.frozen(self.conv(x)) + self.rows + F.interpolate(self.few, x.shape[2:])
        return y * z.mean(), self.rows.sum(1), y.detach(), (y[:, :, 2:-1].sum(1), z * 2)


def test_parameters_by_row_what_all_parts_have_and_outputs_that_are_not_cut(tmp_path):
    torch.manual_seed(0)
    x, z = torch.randn(1, 2, 30, 6).double(), torch.randn(5).double()
    assert held(Rows().double(), (x, z), 3, 2, tmp_path, 2**9).halo == (3,)


def deep(call):
    """Three convolutions, so that a gradient at one row is a sum of what several outputs add."""
    return Net(call, a=conv(2, 3), b=conv(3, 3), c=conv(3, 2))


def plain(m, x):
    return m["c"](F.gelu(m["b"](F.gelu(m["a"](x)))))


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.1, 0.1)


def clipped(m, x):
    return m["c"](m["b"](Clipped.apply(m["a"](x))))


def clipped_by_a_hook(m, x):
    y = m["a"](x)
    if y.requires_grad:
        y.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return m["c"](m["b"](y))


def hooked():
    model = deep(plain)
    model.parts["b"].register_full_backward_hook(lambda m, into, out: (into[0].clamp(-0.1, 0.1),))
    return model


def derived(m, x):
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(m["a"](z).square().sum(), z)
    return m["a"](x) * g.mean(1, keepdim=True)


def remade(m, x):
    return m["c"](checkpoint(lambda y: m["b"](F.gelu(y)) + y, m["a"](x), use_reentrant=False))


MEETING = {
    "batch statistics": lambda: Net(plain, a=conv(2, 3), b=nn.BatchNorm2d(3), c=conv(3, 2)),
    "a gradient that is clipped": lambda: deep(clipped),
    "a hook that clips one": lambda: deep(clipped_by_a_hook),
    "a module's hook that clips one": hooked,
    "a checkpoint": lambda: deep(remade),
}


@pytest.mark.parametrize("name", MEETING)
def test_parts_meet_where_they_must(name, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 36, 6).double()
    run = held(MEETING[name]().double(), (x,), 3, 2, tmp_path, 2**9)
    assert run.halo is None or name == "a checkpoint"


@torch.no_grad()
def test_gradients_inside_of_a_model_are_those_of_all_rows(tmp_path):
    torch.manual_seed(0)
    model, x = deep(derived).double(), torch.randn(1, 2, 36, 6).double()
    run = st.tiled(model, 3, 2, memory=2**9, spill=tmp_path)
    same(run(x), model(x))


def test_parts_are_made_once_as_far_as_they_fit_into_memory(tmp_path):
    torch.manual_seed(0)
    calls = []
    model = deep(lambda m, x: calls.append(1) or plain(m, x)).double()
    x = torch.randn(1, 2, 64, 32).double()
    often = []
    for budget in (2**9, 200_000):
        run = st.tiled(model, 8, 2, memory=budget, spill=tmp_path)
        y = run(x)
        assert run.halo == (3,)
        calls.clear()
        y.sum().backward()
        often.append(len(calls))
    # the last one is there when backward comes, others where two more fit beside them
    assert often[0] == 7 and 3 < often[1] < 7


def test_a_halo_that_is_known_is_tried_first(tmp_path, monkeypatch):
    tried, once = [], alone.Alone._tried
    monkeypatch.setattr(alone.Alone, "_tried", lambda *args: tried.append(1) or once(*args))
    torch.manual_seed(0)
    model = deep(plain).double()
    run = st.tiled(model, 4, 2, memory=2**9, spill=tmp_path)
    often = []
    for rows in (48, 48, 40):
        x = torch.randn(1, 2, rows, 6).double()
        same(run(x).detach(), model(x).detach())
        assert run.halo == (3,)
        often.append(len(tried))
        tried.clear()
    # the middle and the part before it, the first and the last; twice the former, at another halo
    assert often == [6, 4, 4]
    # not enough for a model that became another
    model.parts["b"] = conv(3, 3, 5).double()
    same(run(x).detach(), model(x).detach())
    assert run.halo == (4,)


def test_nothing_goes_to_files(tmp_path, monkeypatch, plain_transport):
    torch.manual_seed(0)
    layers = [layer for i in range(4) for layer in (conv(4 if i else 2, 4), nn.GELU())]
    model, x = nn.Sequential(*layers).double(), torch.randn(1, 2, 256, 8).double()
    found = []
    for more in (-1.0, 0.5):
        monkeypatch.setattr(width, "MORE", more)
        run = held(model, (x,), 8, 2, tmp_path, 2**18)
        found.append((run.halo, run.paging))
    (_, met), (halo, apart) = found
    assert halo == (4,) and met.spilled > 2**19 and apart.spilled == 0
    # a part does not fit; or files are in memory
    monkeypatch.setattr(alone, "KEPT", 1.0)
    assert held(model, (x,), 8, 2, tmp_path, 2**16).halo is None
    monkeypatch.setattr(files, "_free", lambda: 2**24)
    assert held(model, (x,), 8, 2, tmp_path, 2**18).halo is None


def test_what_backward_reads_is_as_it_was(tmp_path):
    torch.manual_seed(0)
    model, x = deep(plain).double(), torch.randn(1, 2, 36, 6).double()
    run = st.tiled(model, 3, 2, memory=2**9, spill=tmp_path)
    y, z = run(x), run(x.clone())
    assert run.halo is not None
    z.sum().backward()
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    z = run(x)
    z.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()

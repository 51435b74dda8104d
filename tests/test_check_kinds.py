"""`check` on models of every make: what is right is called right, and nothing is left behind."""

import asyncio
import collections
import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import shardtensor as st


def conv():
    return nn.Conv2d(3, 3, 3, padding=1)


def image():
    return torch.randn(2, 3, 9, 4, generator=torch.Generator().manual_seed(1))


@dataclasses.dataclass(frozen=True)
class Pair:
    x: torch.Tensor
    scale: float = 2.0
    more: dict = dataclasses.field(default_factory=dict)


Named = collections.namedtuple("Named", "a b")


class Of(nn.Module):
    """A forward of one function, and two layers."""

    def __init__(self, fn):
        super().__init__()
        self.fn, self.c, self.d = fn, conv(), conv()
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, *args, **kwargs):
        return self.fn(self, *args, **kwargs)


def in_place(m, x):
    y = m.c(x)
    y += 1
    y.view(y.shape).mul_(2)
    y[:, 0].mul_(2)
    return m.d(m.relu(y))


def narrow(m, x):
    y = x.to(torch.float32)
    y = (y - y.mean((2, 3), keepdim=True)) * torch.rsqrt(y.var((2, 3), keepdim=True) + 1e-6)
    return m.c(y.to(x.dtype).half().float().type_as(x))


def autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.c(x)


def stateful(m, x):
    m.seen.mul_(0.9).add_(x.detach().mean())
    m.kept = m.c(x)
    return m.kept * m.seen


MODELS = {
    "in place": (in_place, image),
    "twice": (lambda m, x: m.relu(m.c(m.relu(m.c(x)))), image),
    "dict": (lambda m, b: {"y": m.c(b["x"]) * b["m"], "n": b["n"]},
             lambda: ({"x": image(), "m": image(), "n": 3},)),
    "by name": (lambda m, x, by=None: m.c(x) * by, lambda: {"x": image(), "by": torch.tensor(2.0)}),
    "dataclass": (lambda m, p: Pair(m.c(p.x) * p.scale, p.x.shape[2], {"most": p.x.max()}),
                  lambda: (Pair(image()),)),
    "named tuple": (lambda m, p: (m.c(p.a), [Named(p.b.sum(2), p.a)]),
                    lambda: (Named(image(), image()),)),
    "noise": (lambda m, x: m.c(x) + torch.randn_like(x), image),
    "python's random": (lambda m, x: m.c(x.cumsum(2)) * random.random(), image),
    "numpy's random": (lambda m, x: m.c(x.cumsum(2)) * float(np.random.rand()), image),
    "narrow inside": (narrow, image),
    "autocast inside": (autocast, image),
    "state": (stateful, image),
    "checkpoint": (lambda m, x: checkpoint(m.c, x, use_reentrant=False) + m.d(x).detach(), image),
    "a number": (lambda m, x: (m.c(x) ** 2).mean(), image),
    "bf16": (lambda m, x: m.d(m.c(x)), lambda: image().bfloat16()),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_right(name):
    fn, inputs = MODELS[name]
    torch.manual_seed(0)
    model = Of(fn)
    if name == "bf16":
        model.bfloat16()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    report = st.check(model, inputs(), mesh_shapes=[(3,)])
    assert report.verdict == "right" and len(report.findings) == 2, report
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_cast_that_check_cannot_see_is_guessed():
    class Hidden(nn.Module):
        """Casts where nobody sees it."""

        def forward(self, x):
            return narrow_cumsum(x)

    narrow_cumsum = torch.jit.script(_narrow_cumsum)
    report = st.check(Hidden(), image(), mesh_shapes=[(2,)])
    assert "double=False" in str(report)
    assert st.check(Hidden(), image(), mesh_shapes=[(2,)], double=False).verdict == "right"


def _narrow_cumsum(x):
    return x.to(torch.float32).cumsum(2).to(x.dtype)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return None


def test_a_result_without_gradient():
    torch.manual_seed(0)
    model = Of(lambda m, x: (y := m.c(x)) * NoGradient.apply(m.d(x * 2)).detach() + y)
    assert st.check(model, image(), mesh_shapes=[(2,)]).verdict == "right"
    model = Of(lambda m, x: m.c(x) + NoGradient.apply(m.d(x * 2)))
    assert st.check(model, image(), mesh_shapes=[(2,)]).verdict == "right"


class Block(nn.Module):
    """Of what a script may hold."""

    def __init__(self, cast: bool):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.cast = cast

    def forward(self, x):
        y = self.conv(x)
        if self.cast:
            y = (y.float() - y.float().mean()).to(y.dtype)
        return y / 3


@torch.jit.script
def scripted_softmax(x: torch.Tensor):
    return x.float().softmax(-1).to(x.dtype) + x.mean()


class Holding(nn.Module):
    """Calls a scripted function, and keeps what it made of the last call."""

    def __init__(self):
        super().__init__()
        self.fns, self.conv, self.last = [scripted_softmax], conv(), None
        self(image())

    def forward(self, x):
        self.last = {"x": [self.conv(x)]}
        return self.fns[0](self.last["x"][0])


@pytest.mark.parametrize("kind", ["scripted", "cast", "traced", "function"])
def test_scripted_modules_inside(kind):
    torch.manual_seed(0)
    if kind == "function":
        inner = Holding()
    elif kind == "traced":
        inner = torch.jit.trace(Block(False), image())
    else:
        inner = torch.jit.script(Block(kind == "cast"))
    model = nn.Sequential(conv(), inner, conv())
    report = st.check(model, image(), mesh_shapes=[(2,), (3,)])
    assert report.verdict == "right", report
    assert all(p.grad is None for p in model.parameters())


def test_a_fault_beside_a_script_is_found():
    class Local(nn.Module):
        def forward(self, x):
            if isinstance(x, st.ShardTensor):
                return x - x.to_local().mean()
            return x - x.mean()

    torch.manual_seed(0)
    model = nn.Sequential(torch.jit.script(Block(True)), Local(), conv())
    report = st.check(model, image(), mesh_shapes=[(2,)])
    assert report.verdict == "wrong" and report.findings[0].module == "1", report


def test_a_zero_gradient_is_not_wrong_by_its_rounding():
    """The bias of keys has no gradient but rounding."""
    model = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)
    report = st.check(model, torch.randn(2, 9, 8), mesh_shapes=[(3,)])
    assert report.verdict == "right", report


def test_assert_parallel():
    st.testing.assert_parallel(conv(), image(), gathers=False)
    gathering = Of(lambda m, x: m.c(x) + torch.as_strided(x, (3,), (5,)).sum())
    st.testing.assert_parallel(gathering, image(), mesh_shapes=[(2,)])
    with pytest.raises(AssertionError, match="it gathers: as_strided"):
        st.testing.assert_parallel(gathering, image(), mesh_shapes=[(2,)], gathers=False)
    wrong = Of(lambda m, x: m.c(x) + (x.device_mesh.size() if type(x) is st.ShardTensor else 0))
    with pytest.raises(AssertionError, match="NOT RIGHT on 4 of 4 layouts: the model in add at"):
        st.testing.assert_parallel(wrong, image())


def test_bytes_of_gathers_at_the_users_size():
    gathering = Of(lambda m, x: m.c(x) + torch.as_strided(x, (3,), (5,)).sum())
    report = st.check(gathering, image(), mesh_shapes=[(2,)], at=(2, 3, 900, 400))
    nbytes = report.gathered["as_strided"]
    assert f"about {nbytes * 10000} at 2x3x900x400" in repr(report)
    assert f"({__file__}:" in str(report)
    with pytest.raises(ValueError, match="at="):
        st.check(gathering, image(), at=(9, 9))


def test_the_usual_dim():
    for shape, dim in (((2, 3, 9, 8), 2), ((2, 9, 8), 1), ((9, 8), 0)):
        report = st.check(nn.Tanh(), torch.randn(shape), mesh_shapes=[(2,)])
        assert f"dim {dim} in [6, 3]" in str(report)


def after_init():
    """In a process with a world of one rank, as in a notebook."""
    st.init()
    return st.check(conv(), image(), [Shard(2)]).verdict


@pytest.mark.gloo
def test_after_init():
    assert st.testing.run_workers(1, after_init) == ["right"]


def test_in_a_running_event_loop():
    async def cell():
        return st.check(conv(), image(), mesh_shapes=[(2,)]).ok

    assert asyncio.run(cell())


class Cached(nn.Module):
    """Parametrized weights that are kept for a call; copies of the layer have one key there."""

    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(conv())

    def forward(self, x):
        with nn.utils.parametrize.cached():
            return self.layer(self.layer(x).sin())


def test_weights_that_are_kept_for_a_call_are_a_rank_s_own():
    report = st.check(Cached(), image(), [Shard(2)])
    assert report.ok and report.verdict == "right", report
    assert not nn.utils.parametrize._cache


class CompiledInside(nn.Module):
    """A part that torch.compile compiles when it is called: with it whoever looks on."""

    def __init__(self):
        super().__init__()
        self.layer = conv()
        self.part = torch.compile(lambda x: x * x.sigmoid(), backend=never)

    def forward(self, x):
        return self.part(self.layer(x))


def never(graph, inputs):
    raise AssertionError("compiled")


def test_what_is_compiled_inside_runs_as_it_was_written():
    report = st.check(CompiledInside(), image(), [Shard(2)])
    assert report.ok and report.verdict == "right", report

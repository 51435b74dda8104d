"""Backward on a thread of its own gives the same gradients, whatever contexts its forward had.

`pytest --backward-apart` runs all tests so.
"""

import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from flex import flex
from test_flex import packed
from threads import backward_apart
from torch import nn
from torch.autograd import Variable
from torch.distributed.tensor import Shard
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor import _torch, attention, cache
from shardtensor import testing as T
from shardtensor.dispatch.fallback import limit
from shardtensor.rules.conv import halo
from shardtensor.tensor import recut

ATTENTION = partial(F.scaled_dot_product_attention, is_causal=True)
LIBRARY = {
    "conv": (nn.Conv2d(2, 3, 5, padding=2, dtype=torch.float64), [(1, 2, 13, 4)], 2, (5, 0, 8)),
    "attention": (ATTENTION, [(1, 4, 13, 4)] * 3, 2, (4, 4, 5)),
    "batch_norm": (nn.BatchNorm1d(3, dtype=torch.float64), [(13, 3)], 0, (5, 0, 8)),
    "fft": (lambda x: torch.fft.rfft2(x).abs(), [(2, 12, 8)], 1, (4, 4, 4)),
    "take": (lambda x: x[torch.tensor([3, 12, 0, 3])].sort(0).values, [(13, 2)], 0, (5, 3, 5)),
}


@pytest.fixture
def apart():
    # measured once in a process, by passes of its own
    _torch.count_gradients()
    with backward_apart() as engine:
        yield engine


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_s_gradients(name, apart):
    fn, shapes, dim, cut = LIBRARY[name]
    args = [normal(*s, seed=i) for i, s in enumerate(shapes)]
    T.hold(fn, args, [T.shard(dim, cut)] * len(args), (len(cut),))
    # of one device, and of each rank
    assert apart.passes == 1 + len(cut)


def windowed(q, k, v):
    block = create_block_mask(lambda b, h, i, j: (i - j).abs() <= 2, None, None, 13, 13, "cpu")
    return flex(q, k, v, lambda s, b, h, i, j: s - 0.1 * (i - j).abs(), block_mask=block)


def sequences(q, k, v):
    ends = torch.tensor([0, 3, 9, 13], dtype=torch.int32)
    return packed(q, k, v, ends, ends)


def by(kind):
    def attend(q, k, v):
        with attention.strategy(kind):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


RULES = {
    "flex": (windowed, [(1, 2, 13, 4)] * 3, 2, (6, 0, 7)),
    "varlen": (sequences, [(13, 2, 4)] * 3, 0, (6, 0, 7)),
    "neighbours": (lambda *x: st.neighborhood_attention(*x, 3), [(1, 13, 2, 4)] * 3, 1, (6, 0, 7)),
    "gather": (by("gather"), [(1, 3, 13, 4)] * 3, 2, (6, 0, 7)),
    "usp": (by("usp"), [(1, 6, 12, 4)] * 3, 2, (4, 3, 5)),
    "recut": (lambda x: x.sum(0) * x[3], [(5, 7, 4)], 0, (2, 0, 3)),
    "rms": (nn.RMSNorm((7, 4), dtype=torch.float64), [(2, 7, 4)], 1, (3, 0, 4)),
    "scan": (lambda x: x.cumsum(0).logcumsumexp(0), [(13, 2)], 0, (6, 0, 7)),
    "resized": (lambda x: F.interpolate(x, 9, mode="linear"), [(1, 2, 13)], 2, (6, 0, 7)),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_that_keep_more_than_tensors(name, apart, monkeypatch):
    """Of captured functions, plans and windows that backward needs again."""
    # each result that would be whole is large
    cache.clear()
    monkeypatch.setattr(recut, "WHOLE", 1)
    fn, shapes, dim, cut = RULES[name]
    args = [normal(*s, seed=i) for i, s in enumerate(shapes)]
    T.hold(fn, args, [T.shard(dim, cut)] * len(args), (len(cut),))
    assert apart.passes >= 1 + len(cut)
    cache.clear()


def test_an_exchange_behind_computation(apart, in_flight):
    calls = in_flight(halo._HaloConv)
    conv = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
    T.hold(conv, [normal(1, 2, 12, 5)], [T.shard(2, (5, 7))], (2,))
    assert len(calls) == 2 and apart.passes == 3


def ops(x):
    """A draw in the order of memory, attention, and an op without a rule."""
    y = F.dropout(x.mT, 0.5).mT
    y = F.scaled_dot_product_attention(y, y, y)
    return y.sin() + y.mean()


def settings_of(x, reentrant, seen):
    def part(y):
        seen.append((attention.chosen(), limit(), st.random.matching(), threading.get_ident()))
        return ops(y)

    torch.manual_seed(1)
    with attention.strategy("ring"), st.fallback("error"), st.random.match_single_device():
        out = checkpoint(part, x * 2, use_reentrant=reentrant)
    out.square().sum().backward()
    return x.grad


def recomputed(reentrant):
    seen = []
    x = st.distribute_tensor(
        normal(1, 2, 8, 4), T.make_mesh((2,)), [Shard(2)], src_data_rank=None
    ).requires_grad_()
    with attention.strategy("all_to_all"), st.fallback("replicate"):
        return settings_of(x, reentrant, seen).full_tensor(), seen


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_sees_what_forward_saw(reentrant, apart):
    x = normal(1, 2, 8, 4).requires_grad_()
    want = settings_of(x, reentrant, [])
    for grad, seen in st.simulate(2, recomputed, reentrant):
        (*forward, main), (*again, other) = seen
        assert forward == again == ["ring", -1, True] and main != other
        assert torch.allclose(grad, want, rtol=1e-12, atol=1e-14)


def second(x):
    y = F.conv1d(x, torch.ones(2, 2, 3, dtype=torch.float64), padding=1).sin()
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (g.square().sum() + y.sum()).backward()
    return x.grad


def of_shards():
    x = st.distribute_tensor(normal(1, 2, 7), T.make_mesh((2,)), [Shard(2)], src_data_rank=None)
    return second(x.requires_grad_()).full_tensor()


def test_second_derivatives(apart):
    want = second(normal(1, 2, 7).requires_grad_())
    for got in st.simulate(2, of_shards):
        assert torch.allclose(got, want, rtol=1e-12)
    assert apart.passes == 3


@pytest.mark.parametrize("ranks", [False, True])
def test_ranks_make_a_graph_of_gradients_on_one_thread(ranks, monkeypatch):
    """As each thread counts the nodes it makes, and the engine goes by these numbers."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: ranks)
    threads, engine = [], Variable._execution_engine

    class Engine:
        def run_backward(self, *args, **kwargs):
            threads.append(torch._C._is_multithreading_enabled())
            return engine.run_backward(*args, **kwargs)

    monkeypatch.setattr(Variable, "_execution_engine", Engine())
    second(normal(1, 2, 7).requires_grad_())
    torch.autograd.backward(second(normal(1, 2, 7).requires_grad_()).requires_grad_().sum())
    assert threads == [not ranks, True, not ranks, True, True]
    assert torch._C._is_multithreading_enabled()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)]
        ).double()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def trained(checkpointed):
    torch.manual_seed(0)
    model, mesh = Net(), T.make_mesh((2,))
    st.parallelize(model, mesh, checkpoint=checkpointed)
    x = st.distribute_tensor(normal(7, 4), mesh, [Shard(0)], src_data_rank=None)
    model(x).square().mean().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_parameters_of_a_parallel_model(checkpointed, apart):
    torch.manual_seed(0)
    model = Net()
    model(normal(7, 4)).square().mean().backward()
    for got in st.simulate(2, trained, checkpointed):
        for g, p in zip(got, model.parameters(), strict=True):
            assert torch.allclose(g, p.grad, rtol=1e-12)
    assert apart.passes == 3

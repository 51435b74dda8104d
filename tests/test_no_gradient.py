"""A gradient is None where one device has None, on all ranks alike, by whatever node it passed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

D = torch.float64


class Stop(torch.autograd.Function):
    """A sum of which one addend learns nothing."""

    @staticmethod
    def forward(ctx, x, stopped):
        return x + stopped

    @staticmethod
    def backward(ctx, g):
        return g, None


class Both(torch.autograd.Function):
    """Two results, of which each hands on the gradient that it got."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.set_materialize_grads(False)
        return a * 1.0, b * 1.0

    @staticmethod
    def backward(ctx, ga, gb):
        return ga, gb


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.stopped = nn.Linear(4, 4), nn.Linear(4, 4)
        self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.rows = nn.Parameter(torch.randn(7, 4))
        self.double()

    def forward(self, x, way):
        return way(self, self.used(x), x)


# what of the model learns nothing, by the nodes that the gradient would pass
WAYS = {
    "linear": lambda m, y, x: Stop.apply(y, m.stopped(x)),
    "halo": lambda m, y, x: Stop.apply(y, m.conv(x.mT).mT),
    "norm": lambda m, y, x: Stop.apply(y, m.norm((x * m.scale).mT).mT),
    "rows": lambda m, y, x: Stop.apply(y, x * m.rows),
    "gather": lambda m, y, x: Stop.apply(y, (x + m.shift).flip(1).cumsum(1)),
    "sum": lambda m, y, x: Stop.apply(y, (x * m.scale).mean(1, keepdim=True)),
    "softmax": lambda m, y, x: Stop.apply(y, (x * m.scale).softmax(1)),
    "attention": lambda m, y, x: Stop.apply(
        y, F.scaled_dot_product_attention(y[:, None], m.stopped(x)[:, None], x[:, None])[:, 0]
    ),
    "lookup": lambda m, y, x: Stop.apply(y, (x * m.scale)[:, torch.tensor([6, 0, 0, 3, 1, 1, 2])]),
    "one of two": lambda m, y, x: Both.apply(y * m.scale, m.stopped(x))[0],
    "two weights": lambda m, y, x: torch.addcmul(*Both.apply(m.shift, m.scale), y) * m.rows[0],
    "one weight": lambda m, y, x: y * Both.apply(m.shift, m.scale)[1],
    "checkpoint": lambda m, y, x: checkpoint(
        lambda x: Stop.apply(y, m.conv((x * m.scale).mT).mT), x, use_reentrant=False
    ),
    "twice": lambda m, y, x: Stop.apply(y * m.scale, m.stopped(x) * m.scale),
    "not taken": lambda m, y, x: (m.stopped(x), y)[1],
    "no rows": lambda m, y, x: y * (m.stopped(x[:, :0]).sum() + 1) + (x[:, :1] * m.scale).sum(),
}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def steps(place, prepare, way):
    """Three steps whose weights decay and move on; the gradients that there were, in each of them."""
    torch.manual_seed(1)
    net, x = Net(), place(torch.randn(2, 7, 4, dtype=D))
    prepare(net)
    ways = [way, WAYS["not taken"], way]
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    found = []
    for each in ways:
        net(x, each).square().mean().backward()
        found.append({k for k, p in net.named_parameters() if p.grad is None})
        optimizer.step()
        optimizer.zero_grad()
    return found, {k: whole(p.detach()) for k, p in net.named_parameters()}


def seen_by_hooks(place):
    """What hooks are called with: None, too, and the leaf itself."""
    w, x = place(torch.ones(2, 6, dtype=D)).requires_grad_(), place(torch.ones(2, 6, dtype=D))
    seen = []
    h = (w * 2).cumsum(1)
    for t in (h, w):
        t.register_hook(lambda g: seen.append(g is None))
    w.register_post_accumulate_grad_hook(lambda p: seen.append((p is w, p.grad is None)))
    Stop.apply(x.requires_grad_(), h).sum().backward(retain_graph=True)
    (h * 1).sum().backward()
    return seen


def test_hooks_see_none():
    def place(x):
        return st.distribute_tensor(x, make_mesh((2,)), [Shard(1)], src_data_rank=None)

    want = seen_by_hooks(lambda x: x)
    assert (True, True) in want and (True, False) in want
    assert st.simulate(2, seen_by_hooks, place) == [want] * 2


PREPARED = {
    "ops": lambda net: net,
    "buckets": lambda net: st.parallelize(net, make_mesh((2,))),
    "fsdp": lambda net: st.parallelize(net, make_mesh((2,)), fsdp="all"),
}


def held(prepared, names, sizes=(4, 3)):
    def place(x):
        return st.distribute_tensor(
            x, make_mesh((2,)), [Shard(1)], src_data_rank=None, sizes={1: sizes}
        )

    for name in names:
        missing, want = steps(lambda x: x, lambda net: net, WAYS[name])
        assert all(missing), name
        for there, got in st.simulate(2, steps, place, PREPARED[prepared], WAYS[name]):
            assert there == missing, name
            for k, w in want.items():
                assert torch.allclose(got[k], w, rtol=1e-9, atol=1e-12), (name, k)


@pytest.mark.parametrize("way", WAYS)
def test_what_learns_nothing_has_no_gradient(way):
    held("ops", [way], (7, 0) if way in ("halo", "rows") else (4, 3))


@pytest.mark.parametrize("way", ["one of two", "two weights", "one weight", "checkpoint", "twice"])
def test_in_buckets(way):
    held("buckets", [way])


class Blocks(nn.Module):
    """Of which the second hands no gradient on to the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
        self.head = nn.Linear(4, 4).double()
        self.blocks[1].register_forward_hook(lambda m, given, y: Stop.apply(y.detach() + m.bias, y))

    def forward(self, x):
        return self.head(self.blocks[1](self.blocks[0](x)))


def test_before_a_unit_of_fsdp():
    def missing(place, prepare):
        net, x = Blocks(), place(torch.ones(2, 7, 4, dtype=D))
        prepare(net)
        net(x).square().sum().backward()
        return {k for k, p in net.named_parameters() if p.grad is None}

    def place(x):
        return st.distribute_tensor(x, make_mesh((2,)), [Shard(1)], src_data_rank=None)

    want = missing(lambda x: x, lambda net: net)
    assert want == {"blocks.0.weight", "blocks.0.bias", "blocks.1.weight"}
    assert st.simulate(2, missing, place, PREPARED["fsdp"]) == [want] * 2


def test_under_fsdp():
    held("fsdp", ["one of two"])


def test_of_a_graph_that_is_kept():
    """None of two backwards, then of one of them."""

    def grads(place, prepare):
        net, x = Net(), place(torch.ones(2, 7, 4, dtype=D))
        prepare(net)
        a, b = Both.apply(net.used(x), net.conv(x.mT).mT)
        a.sum().backward(retain_graph=True)
        first = {k for k, p in net.named_parameters() if p.grad is None}
        b.sum().backward()
        net.zero_grad(set_to_none=False)
        asked = torch.autograd.grad(
            Stop.apply(net.used(x), net.stopped(x)).sum(), list(net.parameters()), allow_unused=True
        )
        zeros = {k for k, p in net.named_parameters() if p.grad is not None and not p.grad.any()}
        return first, zeros, [g is None for g in asked]

    def place(x):
        return st.distribute_tensor(x, make_mesh((2,)), [Shard(1)], src_data_rank=None)

    want = grads(lambda x: x, lambda net: net)
    for prepared in ("ops", "buckets"):
        assert st.simulate(2, grads, place, PREPARED[prepared]) == [want] * 2

"""Exchanges among many ranks: messages to those that are named, sizes that keep what follows."""

import pickle
import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_comm import DTYPES, NAMES, adjoint, moved
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import comm
from shardtensor.attention import around
from shardtensor.attention.strategy import strategy
from shardtensor.comm import ops, wire
from shardtensor.comm.exchanges import FILL, exchange, pieces
from shardtensor.cuts import Cut, chunk_sizes, cut
from shardtensor.ranks.testing import hold, make_mesh, run_workers, shard
from shardtensor.spec import Dim


def by_messages():
    """Every collective and two ops where no all-to-all stands for an exchange."""
    kept, wire.FEW = wire.FEW, 0
    try:
        held()
    finally:
        wire.FEW = kept


def held():
    for sizes in ((2, 2, 2, 1), (6, 0, 2, 1), (0, 5, 0, 0)):
        for name in NAMES:
            adjoint(name, sizes)
    for dtype in DTYPES:
        for name in ("halo", "periodic", "ring"):
            moved(name, (3, 0, 2, 4), dtype)
    mesh = make_mesh((4,))
    torch.manual_seed(0)
    x = torch.randn(1, 2, 9, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    y = F.conv2d(x, w, padding=(2, 1))
    a = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    (want,) = torch.autograd.grad((y.square().sum() + a.square().sum()), x)
    s = st.distribute_tensor(x.detach(), mesh, [Shard(2)], sizes={2: (4, 0, 4, 1)})
    s.requires_grad_()
    with strategy("ring"):
        b = F.scaled_dot_product_attention(s, s, s, is_causal=True)
    z = F.conv2d(s, w, padding=(2, 1))
    (z.square().sum() + b.square().sum()).backward()
    torch.testing.assert_close(z.full_tensor(), y)
    torch.testing.assert_close(b.full_tensor(), a)
    torch.testing.assert_close(s.grad.full_tensor(), want)


@pytest.mark.gloo
def test_messages_to_those_that_are_named():
    run_workers(4, by_messages)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("large", [1, 2**40])
def test_every_message_of_a_ring_is_waited_for(causal, large, monkeypatch):
    """By those that only send, too: what they send is lost if nobody holds it."""
    started, ended, start = [], [], wire.start_exchange

    def counted(*args, **kwargs):
        arrived = start(*args, **kwargs)
        started.append(arrived)

        def wait():
            ended.append(arrived)
            return arrived()

        return wait

    monkeypatch.setattr(wire, "start_exchange", counted)
    monkeypatch.setattr(around, "LARGE", large)

    def run(x):
        with strategy("ring"):
            return F.scaled_dot_product_attention(x, x, x, is_causal=causal)

    torch.manual_seed(0)
    x = torch.randn(1, 2, 9, 6, dtype=torch.float64)
    for sizes in ((4, 0, 4, 1), (3, 3, 3)):
        hold(run, [x], [shard(2, sizes)], (len(sizes),))
        assert started
        assert set(started) == set(ended)


def test_a_plan_names_what_ranks_need_of_each_other():
    """Of every rank's windows, as rows: what it gets, what others get of it, and what all share."""
    rng = random.Random(0)
    for _ in range(1500):
        n, each = rng.randint(1, 5), rng.choice([1, 1, 2, 3])
        sizes = cut(rng.choice([0, 0, 1, 2, 3, 4]) for _ in range(n))
        total, wrap = sizes.offsets[-1], rng.random() < 0.4
        ranges = []
        for r in range(n):
            kind = rng.choice(["own", "halo", "any"])
            for _ in range(each):
                a, b = sizes.offsets[r : r + 2] if kind != "any" else (rng.randint(-6, 9),) * 2
                h = rng.randint(0, 2) * (kind == "halo")
                ranges.append((a - h, b + h + (kind == "any") * rng.choice([-2, 0, 1, 3, 14])))
        plans = [exchange(sizes, tuple(ranges), wrap, r) for r in range(n)]
        wanted = [
            [p for a, b in ranges[r * each : (r + 1) * each] for p in pieces(sizes, a, b, wrap)]
            for r in range(n)
        ]
        crosses = any(p.source not in (r, FILL) for r, ps in enumerate(wanted) for p in ps)
        own = [[(p.source, p.start + i) for p in ps for i in range(p.length)] for ps in wanted]
        same = own == [[(r, i) for i in range(k)] for r, k in enumerate(sizes)]
        for me, plan in enumerate(plans):
            assert (plan.communicates, plan.identity) == (crosses, same), (sizes, ranges, wrap)
            assert plan.rows == sum(p.length for p in wanted[me])
            if plan.whole:
                assert all(w == (0, total) for w in ranges)
                continue
            assert list(plan.pieces) == wanted[me]
            for r, plan_there in enumerate(plans):
                given = [(p.start, p.length) for p in wanted[r] if p.source == me != r]
                assert list(plan.sends.get(r, ())) == given, (sizes, ranges, wrap, me, r)
                assert plan_there.gets.get(me, ()) == tuple(k for _, k in given)


def test_a_cut_is_the_tuple_of_its_sizes():
    for size in range(0, 40, 3):
        for parts in (1, 2, 3, 7, 50):
            like = torch.empty(size).chunk(parts) if size else ()
            want = tuple(len(c) for c in like) + (0,) * (parts - len(like))
            assert chunk_sizes(size, parts) == want
    c = cut([3, 3, 0, 2, 2, 2, 5])
    assert c == (3, 3, 0, 2, 2, 2, 5) and c == (3, 3, 0, 2, 2, 2, 5) and c != (3, 3)
    assert hash(c) == hash(tuple(c)) and cut(list(c)) is c
    assert c.offsets == (0, 3, 6, 6, 8, 10, 12, 17)
    assert c.runs == ((0, 2, 3), (3, 3, 2), (6, 1, 5))
    assert pickle.loads(pickle.dumps(c)).offsets == c.offsets
    d = Dim(17, (0,), [3, 3, 0, 2, 2, 2, 5])
    assert type(d.sizes) is Cut and type(d._replace(sizes=(17,)).sizes) is Cut
    assert type(pickle.loads(pickle.dumps(d)).sizes) is Cut and d == (17, (0,), tuple(c))


def swapped(shape, old, new, sizes):
    mesh = make_mesh((len(sizes[0]),))
    group, me = comm.group(mesh, (0,)), dist.get_rank()
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    a, b = cut(sizes[0]), cut(sizes[1])
    x = whole.narrow(old, a.offsets[me], a[me]).clone().requires_grad_()
    with st.trace() as t:
        y = comm.swap(x, old, new, a, b, group)
    others = x.numel() - x.narrow(new, b.offsets[me], b[me]).numel()
    assert t.bytes == others * x.element_size()
    assert torch.equal(y, whole.narrow(new, b.offsets[me], b[me])) and y.is_contiguous()
    (g,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(g, x)


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0, 2), (2, 1), (2, 0), (1, 2)])
@pytest.mark.parametrize("own", [False, True])
def test_swaps_of_uneven_cuts(dims, own, monkeypatch):
    monkeypatch.setattr(ops, "_sends_own", lambda x: own)
    old, new = dims
    for sizes in (((3, 2), (4, 1)), ((0, 5, 2), (1, 1, 5)), ((2, 2, 2, 0), (3, 3, 1, 0))):
        shape = [2, 2, 2]
        shape[old], shape[new] = sum(sizes[0]), sum(sizes[1])
        st.simulate(len(sizes[0]), swapped, shape, old, new, sizes)


MANY = (2, 0, 1, 3, 1, 1, 2, 0, 0, 4, 1, 2, 2, 1, 1, 3, 0, 1)


def attention(kind):
    def run(x):
        with strategy(kind):
            return F.scaled_dot_product_attention(x, x * 1.5, x + 1, is_causal=True)

    return run


OPS = {
    "conv": lambda x: F.conv2d(x, torch.linspace(-1, 1, 27, dtype=x.dtype).view(3, 1, 3, 3), None, 2,
                               1, 1, 3),
    "cumsum": lambda x: x.cumsum(2),
    "logcumsumexp": lambda x: x.logcumsumexp(2),
    "roll": lambda x: x.roll(7, 2),
    "repeat": lambda x: x.repeat(1, 1, 2, 1),
    "select": lambda x: x[:, :, 9],
    "sort": lambda x: x.sort(2)[0],
    "fft": lambda x: torch.fft.rfft2(x).abs(),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "mean": lambda x: x.mean(2) * x.sum(),
    "ring": attention("ring"),
    "zigzag": attention("zigzag"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_many_ranks(name):
    """More than 8 ranks gather by rows, more than 16 hold totals for each other."""
    x = torch.randn(1, 3, sum(MANY), 5, dtype=torch.float64, generator=torch.manual_seed(0))
    hold(OPS[name], [x], [shard(2, MANY)], (len(MANY),))

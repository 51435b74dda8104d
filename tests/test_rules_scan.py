"""Running sums, products and extrema along whole and sharded dims against plain torch."""

import pytest
import torch
from kernels import Counted
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
INF, NAN = float("inf"), float("nan")
x = torch.randn(3, 7, 4, dtype=D)


def test_stays_sharded_and_what_is_sent():
    def fn(a):
        return a.cumsum(1), a.cumprod(0), a.logcumsumexp(1), *a.cummax(1)

    specs = T.hold(fn, [x], [T.shard(1, (5, 0, 2))], (3,))
    assert all(s.sizes == {1: (5, 0, 2)} for s in specs)

    def sent(dim):
        s = st.distribute_tensor(x.float(), T.make_mesh((3,)), [Shard(1)]).requires_grad_()
        with st.trace() as forward:
            out = s.cumsum(dim)
        with st.trace() as backward:
            out.to_local().sum().backward()
        return forward.bytes, forward.messages, backward.bytes

    assert st.simulate(3, sent, 2) == [(0, 0, 0)] * 3
    # one row of 12 numbers to each later rank, and its gradient back
    assert st.simulate(3, sent, 1) == [(96, 2, 0), (48, 1, 48), (0, 0, 96)]


@pytest.mark.parametrize("zeros", [[1], [1, 2], [1, 5], [0, 1, 4, 6]])
def test_products_with_zeros(zeros):
    a = x.clone()
    a[:, zeros] = 0
    a[1, 3, 2] = 0
    for cut in ((3, 4), (2, 0, 5), (1, 2, 2, 2)):
        T.hold(lambda t: t.cumprod(1), [a], [T.shard(1, cut)], (len(cut),))


def test_ties_infinities_and_nan():
    def fn(a):
        return *a.cummax(1), *a.cummin(1)

    a = (x * 2).round()
    for cut in ((3, 4), (2, 0, 5), (1, 2, 2, 2)):
        T.hold(fn, [a], [T.shard(1, cut)], (len(cut),))
        b = a.clone()
        b[0, 2], b[1, 4:6], b[2, 0], b[:, 6, 2] = NAN, NAN, INF, -INF
        T.hold(fn, [b], [T.shard(1, cut)], (len(cut),))
        T.hold(lambda t: (t.cumsum(1), t.cumprod(1), t.logcumsumexp(1)), [b], [T.shard(1, cut)],
               (len(cut),), grad=False)  # fmt: skip
        b = a.clone()
        b[:, 0] = -INF
        b[1, :4] = -INF
        T.hold(lambda t: t.logcumsumexp(1), [b], [T.shard(1, cut)], (len(cut),))


def test_dtypes():
    place = [T.shard(1, (5, 0, 2))]
    whole = (x * 3).long()
    T.hold(fn := lambda t: (t.cumsum(1), t.cumprod(1), *t.cummax(1)), [whole], place, (3,))
    T.hold(fn, [whole.int()], place, (3,))
    T.hold(lambda t: (t.cumsum(1), *t.cummin(1)), [whole > 0], place, (3,))
    T.hold(lambda t: (t.cumsum(1), t.cumprod(1)), [torch.complex(x, x + 1)], place, (3,))
    T.hold(lambda t: t.cumsum(1, dtype=D), [whole], place, (3,))
    T.hold(lambda t: (t.cumsum(1), t.cumprod(1), t.logcumsumexp(1)), [x.float()], place, (3,))
    half = x.to(torch.bfloat16)
    T.hold(lambda t: (t.cumsum(1), t.cumprod(1), t.logcumsumexp(1)), [half], place, (3,), rtol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        T.hold(lambda t: t.cumsum(1), [x.float()], place, (3,))


def test_in_place_and_small():
    def fn(a):
        b = a * 1
        b.cumsum_(1)
        b.cumprod_(1)
        return b

    T.hold(fn, [x], [T.shard(1, (5, 0, 2))], (3,))
    T.hold(lambda a: a.int().cumsum_(1), [(x * 3).int()], [T.shard(1)], (3,))
    T.hold(lambda a: a.cumsum(0), [x[:, 0, 0]], [T.shard(0)], (3,))
    T.hold(lambda a: (a.cumsum(1), *a.cummax(1)), [x[:, :1]], [T.shard(1)], (2,))
    T.hold(lambda a: a.cumsum(1), [x[:0]], [T.shard(1)], (2,))
    T.hold(lambda a: a.sum().cumsum(0), [x], [T.shard(1)], (2,))
    T.hold(lambda a: a.sum().cummax(-1)[0], [x], [T.shard(1)], (2,))
    for wrong in (lambda a: a.cumsum(3), lambda a: a.cummax(-4)):
        with pytest.raises(IndexError, match="out of range"):
            wrong(x)
        with pytest.raises(st.RankError, match="out of range"):
            T.hold(lambda a, f=wrong: f(a) if isinstance(a, st.ShardTensor) else a, [x],
                   [T.shard(1)], (2,))  # fmt: skip


def test_second_gradients():
    def twice(a):
        total = (
            a.cumsum(1).pow(3).sum() + a.cumprod(1).pow(2).sum() + a.logcumsumexp(1).pow(2).sum()
        )
        return torch.autograd.grad(total, a, create_graph=True)[0].pow(2)

    T.hold(twice, [x], [T.shard(1, (3, 0, 4))], (3,), rtol=1e-10)


@pytest.mark.parametrize("scan", [torch.cumsum, torch.cumprod, torch.logcumsumexp])
@pytest.mark.parametrize("cut", [(5, 0, 0), (0, 5, 0), (2, 2, 1)], ids=str)
def test_second_gradients_of_vectors(scan, cut):
    weight = torch.arange(1.0, 6, dtype=torch.float64)

    def twice(a):
        total = (scan(a, 0) * weight).pow(2).sum()
        return torch.autograd.grad(total, a, create_graph=True)[0] * weight

    T.hold(twice, [x.flatten()[:5].clone()], [T.shard(0, cut)], (3,), rtol=1e-10)


def test_compiled():
    def fn(a):
        return (a.cumsum(1) * a.cumprod(1) * a.cummax(1)[0] + a.logcumsumexp(1)).pow(2).sum()

    def run(cut):
        s = st.distribute_tensor(x, T.make_mesh((3,)), [Shard(1)], sizes={1: cut})
        s.requires_grad_()
        st.compile(fn, backend="aot_eager")(s).backward()
        return s.grad.full_tensor()

    plain = x.clone().requires_grad_()
    fn(plain).backward()
    for cut in ((4, 0, 3), (0, 6, 1), (4, 3, 0)):
        for got in st.simulate(3, run, cut):
            assert torch.allclose(got, plain.grad, rtol=1e-10)


@pytest.mark.parametrize("fn", [torch.cumsum, torch.logcumsumexp, torch.softmax])
def test_nothing_is_launched_to_learn_a_dtype(fn):
    """Without autocast, under which only torch knows."""

    def run():
        s = st.distribute_tensor(x.float(), T.make_mesh((2,)), [Shard(1)], src_data_rank=None)
        fn(s, 1)
        with Counted() as once:
            fn(s, 1)
        with Counted() as cast, torch.autocast("cpu"):
            fn(s, 1)
        return once.kernels, cast.kernels

    for once, cast in st.simulate(2, run):
        assert once < cast

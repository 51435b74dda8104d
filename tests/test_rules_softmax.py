"""Softmax over whole and sharded dims against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
INF = float("inf")
x = torch.randn(3, 7, 4, dtype=D)


def test_softmax_stays_sharded():
    for dim in (0, 1, 2):
        (spec,) = T.hold(lambda a, d=dim: a.softmax(d), [x], [T.shard(1, (5, 0, 2))], (3,))
        assert spec.sizes == {1: (5, 0, 2)}


def test_infinite_and_large():
    a = x.clone()
    a[:, 2:5] = -INF
    T.hold(lambda t: (t.softmax(1), t.softmax(0)[:, 0]), [a], [T.shard(1)], (3,))
    a[1] = -INF
    for fn in (F.softmax, F.log_softmax, torch.ops.aten._safe_softmax):
        T.hold(lambda t, fn=fn: fn(t, 1), [a], [T.shard(1, (0, 5, 2))], (3,), grad=False)
    a[0, 6, 1], a[2, 1, 0] = INF, float("nan")
    for fn in (F.softmax, F.log_softmax):
        T.hold(lambda t, fn=fn: fn(t, 1), [a], [T.shard(1)], (3,), grad=False)
    T.hold(lambda t: (t.softmax(1), t.log_softmax(1)), [x * 1e4], [T.shard(1)], (3,))
    T.hold(lambda t: torch.ops.aten._safe_softmax(t, 1), [x.clone().index_fill(
        0, torch.tensor([1]), -INF)], [T.shard(1)], (3,))  # fmt: skip


def test_dtypes():
    half = (x * 10).to(torch.bfloat16)
    T.hold(lambda t: (t.softmax(1), t.log_softmax(1)), [half], [T.shard(1)], (3,), rtol=1e-2)
    T.hold(lambda t: t.softmax(1, dtype=torch.float32), [half], [T.shard(1)], (2,), rtol=1e-2)
    T.hold(lambda t: F.softmax((t * 3).long(), 1, dtype=D), [x], [T.shard(1)], (2,), grad=False)
    T.hold(lambda t: (t.softmax(1), t.log_softmax(1)), [x.float()], [T.shard(1)], (3,))
    with torch.autocast("cpu", torch.bfloat16):
        T.hold(lambda t: t.softmax(1), [x.float()], [T.shard(1)], (3,))
    with pytest.raises(st.RankError, match="not implemented for"):
        st.simulate(
            2, lambda: st.distribute_tensor(x, T.make_mesh((2,)), [Shard(1)]).long().softmax(1)
        )


def test_second_gradients():
    def twice(a):
        total = a.softmax(1).pow(3).sum() + a.log_softmax(1).pow(2).sum()
        return torch.autograd.grad(total, a, create_graph=True)[0].pow(2)

    T.hold(twice, [x], [T.shard(1, (3, 0, 4))], (3,), rtol=1e-10)


def test_compiled():
    """The largest value takes no part in the gradient, in a traced graph neither."""

    def fn(a):
        return (
            a.softmax(1).pow(2).sum()
            + (a.log_softmax(1) * a.amax(1, True) * a.std(1, keepdim=True)).sum()
        )

    def run():
        s = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(1)]).requires_grad_()
        st.compile(fn, backend="aot_eager")(s).backward()
        return s.grad.full_tensor()

    plain = x.clone().requires_grad_()
    fn(plain).backward()
    for got in st.simulate(2, run):
        assert torch.allclose(got, plain.grad, rtol=1e-10)


def test_what_is_sent():
    def sent(dim):
        s = st.distribute_tensor(x.float(), T.make_mesh((2,)), [Shard(1)]).requires_grad_()
        with st.trace() as forward:
            out = s.softmax(dim)
        with st.trace() as backward:
            out.to_local().pow(2).sum().backward()
        return forward.bytes, backward.bytes

    assert st.simulate(2, sent, 2) == [(0, 0)] * 2
    # the largest of each of 12 rows and the sum of its exponentials; the gradient of that sum
    assert st.simulate(2, sent, 1) == [(2 * 48, 48)] * 2

"""Reductions, extrema and order statistics against plain torch."""

import pytest
import torch
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D, INF = torch.float64, float("inf")
x = torch.randn(3, 7, 4, dtype=D)


def test_infinite_and_not_a_number():
    a = x.clone()
    a[:, 2] = -INF
    a[1] = -INF
    for fn in (lambda t: t.logsumexp(1), lambda t: t.amax(1), lambda t: t.max(1)):
        # the first shard is empty, so that only its stand-in is as small as all else
        for cut in ((0, 4, 3), (3, 2, 2)):
            T.hold(fn, [a], [T.shard(1, cut)], (3,))
    a[0, 3, 1] = float("nan")
    for fn in (lambda t: t.amax(1), lambda t: t.max(), lambda t: t.max(1)[0], lambda t: t.argmax()):
        T.hold(fn, [a], [T.shard(1)], (3,), grad=False)
    a = x.clone()
    a[0, 3:6, 0] = INF
    T.hold(lambda t: (t.amax(1), t.logsumexp(1)), [a], [T.shard(1)], (3,), grad=False)
    T.hold(lambda t: t.amax(1), [a], [T.shard(1)], (3,))
    T.hold(lambda t: torch.linalg.vector_norm(t, INF, 1), [-a], [T.shard(1)], (3,), grad=False)


def test_few_elements():
    for cut in ((1, 0), (0, 1)):
        one = [x[:, :1]]
        T.hold(lambda t: (t.var(1), t.std(1)), one, [T.shard(1, cut)], (2,), grad=False)
        T.hold(lambda t: (t.var(1, correction=0), t.amax(1)), one, [T.shard(1, cut)], (2,))
    none = x[:, :0]
    fns = (torch.sum, torch.mean, torch.var_mean, torch.logsumexp, torch.norm, torch.prod)
    for fn in fns:
        T.hold(lambda t, fn=fn: fn(t, dim=1), [none], [T.shard(1)], (2,), grad=False)
    scalar = torch.tensor(2.0, dtype=D)
    for fn in (torch.sum, torch.amax, torch.logsumexp, torch.softmax, torch.prod):
        T.hold(lambda t, fn=fn: fn(t, 0), [scalar], [T.replicated()], (2,))


def test_gradients_at_zero():
    same = torch.ones(3, 7, 4, dtype=D)
    T.hold(lambda t: (t.std(1), t.amax(1), t.max()), [same], [T.shard(1)], (3,))
    T.hold(lambda t: (t.norm(dim=1), t.norm(INF, 1), t.prod(1)), [same * 0], [T.shard(1)], (3,))


def test_second_gradients():
    def twice(a):
        total = (a.var(1).sum() + a.std((0, 1)).sum() + a.logsumexp(1).sum() + a.amax(1).pow(2).sum()
                 + a.softmax(1).pow(2).sum() + a.norm(dim=1).sum() + a.prod(1).sum())  # fmt: skip
        (g,) = torch.autograd.grad(total, a, create_graph=True)
        return g.pow(2)

    for cut in ((4, 3), (3, 0, 4)):
        T.hold(twice, [x], [T.shard(1, cut)], (len(cut),), rtol=1e-10)


def test_variance_far_from_zero():
    """In single precision, where a mean of squares would have no digit left."""
    a = (torch.randn(2, 60, generator=torch.Generator().manual_seed(1)) + 1e4).float()
    T.hold(lambda t: t.var(1), [a], [T.shard(1, (20, 0, 33, 7))], (4,), grad=False, rtol=1e-3)


def test_halves():
    half = (x * 100).to(torch.bfloat16)
    for fn in (
        lambda t: (t.mean(1), t.sum(1), t.var(1), t.norm(dim=1), t.amax(1)),
        lambda t: (t.sum(1, dtype=torch.float32), t.logsumexp(1), t.softmax(1)),
    ):
        T.hold(fn, [half], [T.shard(1)], (3,), rtol=1e-2)
    # 2049 is no half: a sum rounded on each rank would lose the one
    near = torch.tensor([[2048.0, 1.0, -2048.0, 0.0]]).half()
    T.hold(lambda t: t.sum(1), [near], [T.shard(1)], (2,))


def test_errors_come_before_messages():
    def run(fn, given):
        with st.fallback("error"):
            return fn(st.distribute_tensor(given, T.make_mesh((2,)), [Shard(1)]))

    for fn, message in (
        (lambda a: a.sum(3), "out of range"),
        (lambda a: a.sum((1, -2)), "multiple times"),
        (lambda a: a.long().mean(), "dtype"),
        (lambda a: a.long().var(1), "floating point"),
        (lambda a: a[:, :0].amax(1), "non-zero size"),
        (lambda a: torch.max(a, 1, out=(x, x)), "out="),
    ):
        with pytest.raises(st.RankError, match=message):
            st.simulate(2, run, fn, x)


def test_out():
    def run():
        mesh = T.make_mesh((2,))
        s = st.distribute_tensor(x, mesh, [Shard(0)])
        values, at = (
            st.distribute_tensor(torch.zeros(3, 4, dtype=t), mesh, [Shard(0)])
            for t in (D, torch.long)
        )
        torch.max(s, 1, out=(values, at))
        return torch.equal(values.full_tensor(), x.amax(1)) and torch.equal(
            at.full_tensor(), x.argmax(1)
        )

    assert all(st.simulate(2, run))


def sent(fn):
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(torch.randn(3, 8, 4), mesh, [Shard(1)]).requires_grad_()
    with st.trace() as forward:
        out = fn(s)
    with st.trace() as backward:
        if out.requires_grad:
            out.to_local().sum().backward()
    return forward.bytes, backward.bytes


@pytest.mark.parametrize("fn, forward, backward", [
    (lambda a: a.sum(2), 0, 0), (lambda a: a.amax(2), 0, 0), (lambda a: a.std(0), 0, 0),
    # 12 numbers of 4 bytes, and nothing on the way back
    (lambda a: a.sum(1), 48, 0), (lambda a: a.mean(1), 48, 0), (lambda a: a.norm(dim=1), 48, 0),
    (lambda a: a.prod(1), 48, 0),
    # the largest and the sum relative to it
    (lambda a: a.logsumexp(1), 96, 0),
    (lambda a: a.var(1), 96, 0), (lambda a: torch.std_mean(a, 1)[0], 96, 0),
    # with the number of ties where a gradient is asked for
    (lambda a: a.detach().amax(1), 48, 0), (lambda a: a.amax(1), 96, 0),
    # values and places
    (lambda a: a.max(1)[0], 48 + 96, 0),
    # an all-to-all of 4 rows of 3 * 4 numbers, some of them kept
    (lambda a: a.median(1)[0], 4 * 3 * 2 * 4, 4 * 3 * 2 * 4),
])  # fmt: skip
def test_what_is_sent(fn, forward, backward):
    assert st.simulate(2, sent, fn) == [(forward, backward)] * 2

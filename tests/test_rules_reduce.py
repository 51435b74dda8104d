"""Reductions, extrema and order statistics against plain torch."""

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
x = torch.randn(3, 7, 4, dtype=D)
ties = torch.randint(-1, 2, (3, 7, 4)).to(D)
zeros = x * (x.abs() > 0.5)
INF = float("inf")
LAYOUTS = [
    ([Shard(1), Shard(2)], {1: (6, 1)}), ([Shard(1), Shard(1)], {1: (3, 0, 2, 2)}),
    ([Shard(0), Shard(1)], None), ([Replicate(), Shard(1)], None), ([Shard(2), Shard(0)], None),
]  # fmt: skip


def over(f, **kwargs):
    return lambda a: [f(a), *(f(a, dim=d, **kwargs) for d in (0, 1, -1, (1, 2), (0, 1)))]


SMOOTH = {
    "sum": over(torch.sum), "mean": over(torch.mean, keepdim=True),
    "var": over(torch.var), "std": over(torch.std, correction=0),
    "var_mean": lambda a: (*torch.var_mean(a, 1), *torch.std_mean(a, (0, 1), keepdim=True)),
    "unbiased": lambda a: (a.var(False), a.std(1, False, True), a.var(unbiased=True)),
    "logsumexp": lambda a: [a.logsumexp(d) for d in (0, 1, (1, 2))],
    "complex": lambda a: [abs(f(torch.complex(a, a * a), d)) for d in (1, (0, 1))
                          for f in (torch.var, torch.std, torch.logsumexp, torch.sum)],
    "dist": lambda a: (torch.dist(a, a.flip(1)), torch.dist(a, a * 2, 3), torch.cov(a[0])),
}  # fmt: skip
ROUGH = {
    "prod": lambda a: (a.prod(), a.prod(1), a.prod(0, keepdim=True)),
    "norms": lambda a: [torch.linalg.vector_norm(a, p, d) for p in (1, 2, 3.5, 0, INF, -INF)
                        for d in (None, 1, (0, 1))] + [torch.linalg.vector_norm(a, -1.5, 1)],
    "linalg norm": lambda a: (torch.linalg.norm(a), torch.linalg.norm(a, 1, (1, 2)),
                              torch.linalg.matrix_norm(a, -INF, (0, 1))),
    "norm": lambda a: (a.norm(), a.norm(dim=1), torch.norm(a, 1, 1), a.norm(INF)),
    "nansum": lambda a: torch.nansum(torch.where(a > 1, float("nan"), a), 1),
    "nanmean": lambda a: torch.nanmean(torch.where(a > 1, float("nan"), a), 1),
    "amax": lambda a: (a.amax(1), a.amin((0, 1)), a.amax(), a.max(), a.min(), *a.aminmax(dim=1)),
    "max": lambda a: (*a.max(1), *a.min(1, keepdim=True), *a.max(0), *torch.max(a, dim=2)),
    "order": lambda a: (*a.median(1), *a.nanmedian(0), *a.kthvalue(2, 1, True)),
    "quantile": lambda a: (a.quantile(0.3, 1), a.nanquantile(torch.tensor([0.2, 1.0]).to(a), 1, True)),
    "maximum": lambda a: (torch.max(a, a.roll(1, 1)), torch.minimum(a, a * 2)),
}  # fmt: skip
COUNTS = {
    "logical": lambda a: ((a > 0).all(1), (a > 2).any(1), (a > 9).any(), (a < 9).all(), (a > 0).any(
        (0, 1)), (a > 0).all(dim=()), a.bool().to(torch.uint8).all(1), torch.allclose(a, a + 1e-9)),
    "count": lambda a: (a.count_nonzero(), a.count_nonzero(1), (a > 0).sum(1)),
    "arg": lambda a: (a.argmax(), a.argmin(), a.argmax(1), a.argmin(1, keepdim=True), a.argmax(0)),
    "ints": lambda a: ((a * 9).long().sum(1), (a * 9).long().amax(1), *(a * 9).long().min(1),
                       (a * 9).int().prod(1), (a > 0).prod(1, dtype=torch.uint8)),
    "mode": lambda a: (*a.round().mode(1), *torch.mode(a.round(), 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*SMOOTH, *ROUGH, *COUNTS])
def test_reductions(name):
    fn = SMOOTH.get(name) or ROUGH.get(name) or COUNTS[name]
    for given in [x] if name in SMOOTH else [x, ties, zeros]:
        for cut in T.cuts(7):
            T.hold(fn, [given], [T.shard(1, cut)], (len(cut),), grad=name not in COUNTS)
        T.hold(fn, [given], [T.shard(2)], (3,), grad=name not in COUNTS)
        for placements, sizes in LAYOUTS:
            T.hold(fn, [given], [T.On(placements, sizes)], (2, 2), grad=name not in COUNTS)


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
    for fn in (lambda t: (t.mean(1), t.sum(1), t.var(1), t.norm(dim=1), t.amax(1)),
               lambda t: (t.sum(1, dtype=torch.float32), t.logsumexp(1), t.softmax(1))):  # fmt: skip
        T.hold(fn, [half], [T.shard(1)], (3,), rtol=1e-2)
    # 2049 is no half: a sum rounded on each rank would lose the one
    near = torch.tensor([[2048.0, 1.0, -2048.0, 0.0]]).half()
    T.hold(lambda t: t.sum(1), [near], [T.shard(1)], (2,))


def test_errors_come_before_messages():
    def run(fn, given):
        with st.fallback("error"):
            return fn(st.distribute_tensor(given, T.make_mesh((2,)), [Shard(1)]))

    for fn, message in (
        (lambda a: a.sum(3), "out of range"), (lambda a: a.sum((1, -2)), "multiple times"),
        (lambda a: a.long().mean(), "dtype"), (lambda a: a.long().var(1), "floating point"),
        (lambda a: a[:, :0].amax(1), "non-zero size"),
        (lambda a: torch.max(a, 1, out=(x, x)), "out="),
    ):  # fmt: skip
        with pytest.raises(st.RankError, match=message):
            st.simulate(2, run, fn, x)


def test_out():
    def run():
        mesh = T.make_mesh((2,))
        s = st.distribute_tensor(x, mesh, [Shard(0)])
        values, at = (st.distribute_tensor(torch.zeros(3, 4, dtype=t), mesh, [Shard(0)])
                      for t in (D, torch.long))  # fmt: skip
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


def test_fp32():
    y = x.float()
    for fn in (lambda a: a.std(1), lambda a: a.prod(1), lambda a: a.logsumexp(1), torch.amax):
        T.hold(fn, [y], [T.shard(1)], (3,))

"""Reductions, extrema, softmax and losses against plain torch."""

import pytest
import torch
import torch.nn.functional as F
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
    "softmax": lambda a: [f(a, d) for d in (0, 1, 2) for f in (F.softmax, F.log_softmax, F.softmin)],
    "normalize": lambda a: (F.normalize(a, dim=1), F.cosine_similarity(a, a.roll(1, 1), dim=1)),
    "cumulative mean": lambda a: a.mean(1).softmax(0),
}  # fmt: skip
ROUGH = {
    "prod": lambda a: (a.prod(), a.prod(1), a.prod(0, keepdim=True)),
    "norms": lambda a: [torch.linalg.vector_norm(a, p, d) for p in (1, 2, 3.5, 0, INF, -INF)
                        for d in (None, 1, (0, 1))],
    "norm": lambda a: (a.norm(), a.norm(dim=1), torch.norm(a, 1, 1), a.norm(INF)),
    "nansum": lambda a: torch.nansum(torch.where(a > 1, float("nan"), a), 1),
    "nanmean": lambda a: torch.nanmean(torch.where(a > 1, float("nan"), a), 1),
    "amax": lambda a: (a.amax(1), a.amin((0, 1)), a.amax(), a.max(), a.min(), *a.aminmax(dim=1)),
    "max": lambda a: (*a.max(1), *a.min(1, keepdim=True), *a.max(0), *torch.max(a, dim=2)),
    "maximum": lambda a: (torch.max(a, a.roll(1, 1)), torch.minimum(a, a * 2)),
}  # fmt: skip
COUNTS = {
    "logical": lambda a: ((a > 0).all(1), (a > 2).any(1), (a > 9).any(), (a < 9).all(), (a > 0).any(
        (0, 1))),
    "count": lambda a: (a.count_nonzero(), a.count_nonzero(1), (a > 0).sum(1)),
    "arg": lambda a: (a.argmax(), a.argmin(), a.argmax(1), a.argmin(1, keepdim=True), a.argmax(0)),
    "ints": lambda a: ((a * 9).long().sum(1), (a * 9).long().amax(1), *(a * 9).long().min(1),
                       (a * 9).int().prod(1)),
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


def test_extremes():
    a = x.clone()
    a[:, 2] = -INF
    a[1] = -INF
    for fn in (lambda t: t.softmax(1), lambda t: t.logsumexp(1), lambda t: t.amax(1)):
        T.hold(fn, [a], [T.shard(1)], (3,), grad=False)
    a[0, 3, 1] = float("nan")
    for fn in (lambda t: t.amax(1), lambda t: t.max(), lambda t: t.max(1)[0], lambda t: t.argmax()):
        T.hold(fn, [a], [T.shard(1)], (3,), grad=False)
    a = x.clone()
    a[0, 3:6, 0] = INF
    T.hold(lambda t: t.amax(1), [a], [T.shard(1)], (3,))
    constant = torch.ones(3, 7, 4, dtype=D)
    T.hold(lambda t: t.std(1), [constant], [T.shard(1)], (3,))
    T.hold(lambda t: t.norm(dim=1), [constant * 0], [T.shard(1)], (3,))
    T.hold(lambda t: t.var(1), [x[:, :1]], [T.shard(1)], (2,), grad=False)
    half = (x * 100).to(torch.bfloat16)
    T.hold(lambda t: (t.mean(1), t.softmax(1)), [half], [T.shard(1)], (3,), rtol=1e-2)
    T.hold(lambda t: t.softmax(1, dtype=torch.float32), [half], [T.shard(1)], (2,), rtol=1e-2)
    with pytest.raises(st.RankError, match="out of range"):
        st.simulate(2, lambda: st.distribute_tensor(x, T.make_mesh((2,)), [Shard(0)]).sum(3))


p = torch.rand(3, 7, 4, dtype=D) * 0.9 + 0.05
sign = torch.where(torch.rand(3, 7, 4) > 0.5, 1.0, -1.0).to(D)
LOSSES = {
    "mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "huber": F.huber_loss,
    "bce logits": lambda a, b, reduction: F.binary_cross_entropy_with_logits(
        a, p, weight=p[0], pos_weight=p[0, 0], reduction=reduction),
    "bce": lambda a, b, reduction: F.binary_cross_entropy(a.sigmoid(), p, p, reduction=reduction),
    "soft margin": lambda a, b, reduction: F.soft_margin_loss(a, sign, reduction=reduction),
    "kl": lambda a, b, reduction: F.kl_div(a, b.softmax(1), reduction=reduction),
    "kl log": lambda a, b, reduction: F.kl_div(a, b, reduction=reduction, log_target=True),
    "gaussian": lambda a, b, reduction: F.gaussian_nll_loss(a, b, p, reduction=reduction),
    "poisson": lambda a, b, reduction: F.poisson_nll_loss(a, p, reduction=reduction),
    "hinge": lambda a, b, reduction: F.hinge_embedding_loss(a, sign, reduction=reduction),
    "ranking": lambda a, b, reduction: F.margin_ranking_loss(a, b, sign, 0.1, reduction=reduction),
    "multilabel": lambda a, b, reduction: F.multilabel_soft_margin_loss(
        a.flatten(0, 1), p.flatten(0, 1), reduction=reduction),
    "cosine": lambda a, b, reduction: F.cosine_embedding_loss(
        a[0], b[0], sign[0, :, 0], 0.2, reduction=reduction),
    "triplet": lambda a, b, reduction: F.triplet_margin_loss(a, b, p, reduction=reduction),
    "triplet distance": lambda a, b, reduction: F.triplet_margin_with_distance_loss(
        a, b, p, reduction=reduction),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    y = torch.randn_like(x)
    for reduction in ("mean", "sum", "none"):

        def loss(a, b, r=reduction):
            return LOSSES[name](a, b, reduction=r)

        for cut in T.cuts(7):
            T.hold(loss, [x, y], [T.shard(1, cut), None], (len(cut),))
        T.hold(loss, [x, y], [T.shard(1), T.shard(2)], (2,))
        T.hold(loss, [x, y], [T.On([Shard(1), Shard(2)]), T.On([Shard(0), Shard(1)])], (2, 2))
    if name == "kl":
        T.hold(lambda a, b: F.kl_div(a, b.softmax(1), reduction="batchmean"), [x, y],
               [T.shard(0), None], (2,))  # fmt: skip


def test_class_losses():
    logits = torch.randn(3, 5, 7, 2, dtype=D)
    target = torch.randint(0, 5, (3, 7, 2))
    target[0, 1] = -100
    w = torch.rand(5, dtype=D)
    soft = torch.rand(3, 5, 7, 2, dtype=D).softmax(1)
    for reduction in ("mean", "sum", "none"):
        for weight in (None, w):
            for smooth in (0.0, 0.2):

                def loss(a, t, r=reduction, weight=weight, s=smooth):
                    return F.cross_entropy(a, t, weight, reduction=r, label_smoothing=s)

                for cut in ((4, 3), (6, 0, 1), (1, 2, 3, 1)):
                    n = (len(cut),)
                    T.hold(loss, [logits, target], [T.shard(2, cut), None], n)
                    T.hold(loss, [logits, target], [T.shard(2, cut), T.shard(1)], n)
                    T.hold(loss, [logits, soft], [T.shard(2, cut), None], n)
                T.hold(loss, [logits, target], [T.shard(1), None], (2,))
                T.hold(loss, [logits[:, :, 0, 0], target[:, 0, 0]], [T.shard(0), T.shard(0)], (2,))
            T.hold(lambda a, t, r=reduction, weight=weight: F.nll_loss(
                F.log_softmax(a, 1), t, weight, reduction=r, ignore_index=2),
                [logits, target.clamp(min=0)], [T.On([Shard(2), Shard(3)]), None], (2, 2))  # fmt: skip


def sent(fn):
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(torch.randn(3, 8, 4), mesh, [Shard(1)])
    with st.trace() as t:
        fn(s)
    return t.bytes


def test_what_is_sent():
    assert st.simulate(2, sent, lambda a: a.sum(2)) == [0, 0]
    assert st.simulate(2, sent, lambda a: a.softmax(2)) == [0, 0]
    # one number there and back; the mean is that sum
    assert st.simulate(2, sent, lambda a: F.mse_loss(a, a)) == [4, 4]
    assert st.simulate(2, sent, lambda a: a.sum(1)) == [48, 48]
    assert st.simulate(2, sent, lambda a: a.max(1)) == [48 + 96, 48 + 96]


def test_fp32():
    y = x.float()
    for fn in (lambda a: F.mse_loss(a, y), lambda a: a.softmax(1), lambda a: a.std(1)):
        T.hold(fn, [y], [T.shard(1)], (3,))

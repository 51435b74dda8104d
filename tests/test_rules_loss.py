"""Losses and distances against plain torch: global means, whatever the sizes of the shards."""

import re

import pytest
import torch
import torch.nn.functional as F
from cases.loss import REDUCTIONS
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
x = torch.randn(3, 7, 4, dtype=D)


def test_class_losses():
    logits = torch.randn(3, 5, 7, 2, dtype=D)
    target = torch.randint(0, 5, (3, 7, 2))
    target[0, 1] = -100
    w = torch.rand(5, dtype=D)
    soft = torch.rand(3, 5, 7, 2, dtype=D).softmax(1)
    for reduction in REDUCTIONS:
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


def test_class_losses_of_few_dims():
    logits, w = torch.randn(6, 5, dtype=D), torch.rand(5, dtype=D)
    target = torch.tensor([0, 4, 2, 2, 1, 3])
    for r in REDUCTIONS:

        def loss(a, t, r=r):
            return F.cross_entropy(a, t, w, ignore_index=2, reduction=r)

        for place in (T.shard(0, (2, 0, 4)), T.shard(1, (1, 4, 0)), T.replicated()):
            # the target alone sharded; both; the input alone
            T.hold(loss, [logits, target], [None, T.shard(0)], (3,))
            T.hold(loss, [logits, target], [place, T.shard(0)], (3,))
            T.hold(loss, [logits, target], [place, T.replicated()], (3,))
        nested = T.On([Shard(0), Shard(0)], {0: (3, 0, 1, 2)})
        T.hold(loss, [logits, target], [nested, None], (2, 2))
        T.hold(loss, [logits, target], [T.On([Replicate(), Shard(0)]), None], (2, 2))
        T.hold(loss, [logits[0], target[0]], [T.shard(0), None], (2,))
    nothing_counts = torch.full((6,), 2)
    T.hold(loss, [logits, nothing_counts], [T.shard(0), None], (2,), grad=False)
    with pytest.raises(st.RankError, match="shapes differ"):
        st.simulate(2, lambda: F.cross_entropy(
            st.distribute_tensor(logits, T.make_mesh((2,)), [Shard(0)]), target[:4]))  # fmt: skip


def test_margins():
    scores, w = torch.randn(6, 5, dtype=D), torch.rand(5, dtype=D)
    target = torch.tensor([0, 4, 2, 2, 1, 3])
    labels = torch.tensor([[3, 0, -1, 1, 2], [1, -1, 0, 2, 4]] * 3)
    for r in REDUCTIONS:

        def one(a, t, r=r):
            return F.multi_margin_loss(a, t, 2, 0.7, w, reduction=r)

        def many(a, t, r=r):
            return F.multilabel_margin_loss(a, t, reduction=r)

        for fn, t in ((one, target), (many, labels)):
            for place in (T.shard(0, (2, 0, 4)), T.shard(1)):
                T.hold(fn, [scores, t], [place, None], (3,))
            T.hold(fn, [scores, t], [None, T.shard(0)], (2,))
            T.hold(fn, [scores[0], t[0]], [T.shard(0), None], (2,))
        T.hold(one, [scores[0], target[1:2]], [T.shard(0), T.shard(0)], (2,))
        T.hold(many, [scores[0, 0], labels[1, 2]], [T.replicated(), None], (2,))


def test_broadcasting_and_replicated():
    y = torch.randn(7, 4, dtype=D)
    for fn in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss):
        with pytest.warns(UserWarning, match="target size"):
            T.hold(fn, [x, y], [T.shard(1, (4, 0, 3)), None], (3,))
            T.hold(fn, [y, x], [T.shard(0), None], (3,))
        T.hold(fn, [x, x.flip(0)], [T.replicated(), T.replicated()], (3,))
        T.hold(fn, [x, x.flip(0)], [T.replicated(), T.shard(1)], (3,))
    # a learned plain prediction against sharded data: its gradient is whole
    T.hold(F.mse_loss, [x, x.flip(1)], [None, T.shard(1, (5, 0, 2))], (3,))


@pytest.mark.filterwarnings("ignore")
def test_gathered():
    """Losses without a rule of their own run gathered, and are right."""
    logs = torch.randn(9, 4, 5, dtype=D).log_softmax(2)
    targets = torch.randint(1, 5, (4, 3))

    def ctc(a):
        return F.ctc_loss(a, targets, (9, 9, 8, 7), (3, 2, 3, 1))

    for d in range(3):
        T.hold(ctc, [logs], [T.shard(d)], (2,), gather=True)


def test_rows_of_distances_stay_sharded():
    for first, second, expected in (
        (T.shard(1), None, {1: (4, 3)}),
        (None, T.shard(1), {2: (4, 3)}),
        (T.shard(1), T.shard(1), {1: (4, 3)}),
        (T.shard(0), T.shard(0), {0: (2, 1)}),
    ):
        (spec,) = T.hold(torch.cdist, [x, x.flip(1)], [first, second], (2,))
        assert spec.sizes == expected
    # more rows than torch computes one by one
    many = torch.randn(30, 3, dtype=D)
    T.hold(torch.cdist, [many, many.flip(1) + 1], [T.shard(0), T.shard(0)], (4,), rtol=1e-10)


def sent(fn):
    s = st.distribute_tensor(torch.randn(3, 8, 4), T.make_mesh((2,)), [Shard(1)]).requires_grad_()
    with st.trace() as forward:
        loss = fn(s)
    with st.trace() as backward:
        loss.backward()
    return forward.bytes, backward.bytes


def test_what_is_sent():
    target = torch.randint(0, 8, (3, 4))
    # one number
    assert st.simulate(2, sent, lambda a: F.mse_loss(a, torch.ones(3, 8, 4))) == [(4, 0)] * 2
    # three: the loss, the sum of weights, whether a rank failed
    moved = st.simulate(2, sent, lambda a: F.cross_entropy(a.mT, target[:, :1].expand(3, 8) % 4))
    assert moved == [(12, 0)] * 2


def test_fp32_and_halves():
    y = x.float()
    T.hold(lambda a: F.mse_loss(a, y), [y.flip(1)], [T.shard(1)], (3,))
    h = (x * 200).half()
    T.hold(lambda a: F.mse_loss(a, a.flip(1)), [h / 20], [T.shard(1)], (3,), rtol=1e-2)
    T.hold(
        lambda a: F.cross_entropy(a, torch.ones(3, 4).long()), [h], [T.shard(2)], (2,), rtol=1e-2
    )
    with torch.autocast("cpu", torch.bfloat16):
        T.hold(lambda a: F.mse_loss(a @ y[0].mT, a.sum(2, keepdim=True)), [y], [T.shard(1)], (3,),
               rtol=2e-2)  # fmt: skip


def mistaken(case):
    args, options = case
    mesh = T.make_mesh((3,))
    t = args[1]
    t = st.distribute_tensor(t, mesh, [Shard(0)], sizes={0: (len(t), 0, 0)})
    with pytest.raises(RuntimeError) as raised:
        F.cross_entropy(args[0], t, *args[2:], **options)
    return str(raised.value)


def test_mistakes_are_found_where_a_rank_has_no_targets():
    """Torch finds them in a shard that has elements."""
    logits, t = x[:, :, 0], torch.tensor([0, 6, 3])
    T.hold(F.cross_entropy, [logits, t.byte()], [T.shard(0), T.shard(0, (3, 0))], (2,))
    weights = [torch.ones(6, dtype=D), torch.ones(1, 7, dtype=D), torch.ones(7)]
    cases = [((logits, t, w), {"reduction": r}) for w in weights for r in REDUCTIONS]
    cases += [((logits, t.to(d)), {}) for d in (torch.int32, torch.bool)]
    cases.append(((logits, t), {"label_smoothing": 1.5}))
    cases.append(((x.mT, torch.zeros(3, 7, dtype=torch.uint8)), {}))
    for case in cases:
        with pytest.raises(RuntimeError):
            F.cross_entropy(*case[0], **case[1])
        (said,) = set(st.simulate(3, mistaken, case))
        assert re.search(r"class indices|weight|label_smoothing|dtype|scalar type", said), said

"""Elementwise ops, casts, in-place writes, creation like a tensor, dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Partial, Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
x, y = torch.randn(2, 7, 5, dtype=D), torch.randn(2, 7, 5, dtype=D)


def test_outer_broadcast_uses_both_axes():
    a, b = x[0], y[1, :1]
    spec = T.hold(
        lambda p, q: p[:, None, :] * q[None],
        [a, b],
        [T.On([Shard(0), Replicate()]), T.On([Replicate(), Shard(1)])],
        (2, 2),
    )[0]
    assert spec.placements == (Shard(0), Shard(2))


def test_dtypes():
    s = T.shard(1, (4, 3))
    half = (x * 3).to(torch.bfloat16)
    for a in (x.float(), half, (x * 5).long(), x > 0, x.to(torch.complex64)):
        T.hold(lambda t: t + t, [a], [s], (2,), grad=a.is_floating_point())
    T.hold(lambda t: t.float() * 2, [x], [s], (2,))
    T.hold(lambda t: t.to(torch.float32).type_as(t), [x], [s], (2,), rtol=1e-6)
    T.hold(lambda t: t.long() + 0.5, [x], [s], (2,), grad=False)
    T.hold(lambda t: (t > 0).to(t), [x], [s], (2,), grad=False)


def partial_sums():
    mesh = T.make_mesh((2,))
    part = torch.arange(6.0).reshape(2, 3).requires_grad_()
    s = st.ShardTensor.from_local(part, mesh, [Partial()])
    out = (s + 1) * s.sin()
    whole = (2 * torch.arange(6.0).reshape(2, 3)).requires_grad_()
    want = (whole + 1) * whole.sin()
    T.same(out, want.detach(), "partial")
    out.sum().backward()
    want.sum().backward()
    T.same(part.grad, whole.grad, "cotangent of an addend")
    added = s.detach()
    added.add_(1)
    T.same(added, whole.detach() + 1, "addends are added up before a write")
    with pytest.raises(st.UnsupportedOpError, match="partial sums are read"):
        s.sum()


def test_partial_sums_are_added_first():
    st.simulate(2, partial_sums)


def writes():
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(x, mesh, [Shard(1)])
    d, whole = s.unbind(1)[3], x.clone()
    d.add_(1)
    d[0].mul_(2)
    whole.unbind(1)[3].add_(1)[0].mul_(2)
    T.same(s, whole, "rows")
    T.same(d, whole[:, 3], "a row")
    s = st.distribute_tensor(x, mesh, [Shard(1)])
    base = s * 1
    d = base.select(1, 3)
    del base
    d.add_(1)
    T.same(d, x.select(1, 3) + 1, "the base is gone")
    part, plain = s * 1, x.clone()
    part.diagonal(0, 1, 2).add_(1)
    plain.diagonal(0, 1, 2).add_(1)
    T.same(part, plain, "a view")
    T.same(torch.zeros(2, 7, 5, dtype=D).add_(s), x, "a plain tensor takes the whole")
    out = torch.empty_like(s)
    assert torch.sin(s, out=out) is out
    T.same(out, x.sin(), "out=")
    # one row a rank: contiguous there, but not as a whole
    t = st.distribute_tensor(x[0, :2], mesh, [Shard(0)])
    t.T.contiguous().add_(1)
    T.same(t, x[0, :2], "a copy")


@pytest.mark.filterwarnings("ignore::shardtensor.FallbackWarning")
def test_writes_reach_their_base_or_are_refused():
    st.simulate(2, writes)


def like():
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(x, mesh, [Shard(1)])
    T.same(torch.zeros_like(s), torch.zeros_like(x), "zeros_like")
    T.same(torch.full_like(s, 3), torch.full_like(x, 3), "full_like")
    assert torch.rand_like(s).spec == s.spec
    assert type(s.new_zeros(3)) in (torch.Tensor, st.ShardTensor)


def test_like():
    st.simulate(2, like)


def drops(seed_by_rank):
    import torch.distributed as dist

    mesh = T.make_mesh((2, 2))
    ones = torch.ones(40, 1, 50, dtype=D)
    torch.manual_seed(dist.get_rank() if seed_by_rank else 5)
    s = st.distribute_tensor(ones, mesh, [Shard(0), Replicate()]).requires_grad_()
    for p in (0.0, 0.25, 1.0):
        out = F.dropout(s, p)
        full = out.full_tensor()
        assert set(full.unique().tolist()) <= {0.0, 1 / (1 - p) if p < 1 else 0.0}
        s.grad = None
        out.sum().backward()
        T.same(s.grad, full.detach(), "the gradient's mask is the value's")
    kept = (F.dropout(s, 0.25).full_tensor() != 0).double()
    assert abs(kept.mean() - 0.75) < 0.05
    first, second = kept[:20], kept[20:]
    assert not torch.equal(first, second), "shards repeat each other"
    assert F.dropout(s, 0.5, training=False).full_tensor().equal(ones)
    channels = F.dropout2d(
        st.distribute_tensor(torch.ones(4, 60, 6, 2), mesh, [Shard(2), Shard(3)])
    )
    channels = channels.full_tensor()
    assert torch.equal(channels, channels[:, :, :1, :1].expand_as(channels))
    assert 0.2 < (channels != 0).float().mean() < 0.8
    drawn = torch.randn_like(s).full_tensor()
    assert abs(drawn.mean()) < 0.1 and abs(drawn.std() - 1) < 0.1
    return kept, channels, drawn


@pytest.mark.parametrize("seed_by_rank", [False, True])
def test_dropout(seed_by_rank):
    """The same on all replicas, other numbers on each shard, however ranks are seeded."""
    found = st.simulate(4, drops, seed_by_rank)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)
    if not seed_by_rank:
        again = st.simulate(4, drops, False)
        assert torch.equal(found[0][0], again[0][0])


def into_shards():
    o = st.distribute_tensor(torch.zeros(6, 4), T.make_mesh((2,)), [Shard(0)])
    a = torch.arange(24.0).view(6, 4)
    for want, call in (
        (a.sin(), lambda: torch.sin(a, out=o)),
        (a + a, lambda: torch.add(a, a, out=o)),
        (a @ a[:4], lambda: torch.matmul(a, a[:4], out=o)),
    ):
        assert call() is o
        T.same(o, want, "out= of plain operands")
    total = o.sum(1)
    assert torch.sum(a, 1, out=total) is total
    T.same(total, a.sum(1), "out= of a plain reduction")
    with pytest.raises(RuntimeError, match="Long"):
        torch.add(a, a, out=o.long())


def test_plain_operands_into_shards():
    st.simulate(2, into_shards)


@pytest.mark.filterwarnings("ignore::shardtensor.FallbackWarning")
def test_other_names_of_writes_into_plain_tensors():
    def written(a, b):
        return (a * 1).multiply_(b).arctan2_(b).subtract_(b)

    T.hold(written, [x, x + 5], [None, T.shard(1)], (2,), gather=True)


def test_prelu_of_channels_where_a_dim_of_one_row_is_cut():
    T.hold(F.prelu, [x[:, :, :1], y[0, :, 0]], [T.shard(2, (0, 1)), None], (2,))

"""What is one memory in torch: reads after writes, versions, and what C++ takes for plain memory."""

import gc

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Partial, Shard
from torch.utils.dlpack import to_dlpack

import shardtensor as st
from shardtensor import _torch
from shardtensor import testing as T
from shardtensor.tensor import aliases

D = torch.float64
X = torch.arange(21, dtype=D).reshape(7, 3).sin()


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = x * x
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx, g):
        x, _ = ctx.saved_tensors
        return 2 * x * g


def copied_row_written(x):
    r = x[-1]
    r.add_(1)
    return x, r


def other_rows_stay_readable(x):
    first, last = x[0], x[-1]
    first.mul_(3)
    x[2] = last
    return x, first, last


def rows_written_in_a_loop(x):
    for row in x:
        row += 1
    return x


def unbound(x):
    a, *_, b = x.unbind(0)
    a += 2
    return x, a, b


def loss_grows(x):
    loss = x.sum()
    loss += 1
    part = torch.einsum("ij,ij->", x, x)
    part *= 2
    return loss, part, torch.dot(x[:, 0], x[:, 1]).sub_(3)


def running(x):
    total = torch.zeros((), dtype=D)
    total += x.sum()
    buffer = torch.ones(3, dtype=D)
    buffer.lerp_(x.mean(0), 0.25)
    buffer[1] = x.sum()
    return total, buffer.mul_(x.amax(0))


def each_element(x):
    x.apply_(lambda v: v * 2 + 1)
    return x


RIGHT = [
    copied_row_written, other_rows_stay_readable, rows_written_in_a_loop, unbound, loss_grows, running,
    each_element,
]  # fmt: skip


@pytest.mark.parametrize("fn", RIGHT)
@pytest.mark.parametrize("cut", [(7,), (4, 3), (1, 6), (0, 5, 2), (3, 0, 4, 0)])
def test_right(fn, cut):
    want = fn(X.clone())

    def run():
        x = st.distribute_tensor(
            X, T.make_mesh((len(cut),)), [Shard(0)], src_data_rank=None, sizes={0: cut}
        )
        got = fn(x)
        for g, w in zip(T.tensors(got), T.tensors(want), strict=True):
            T.same(g, w, fn.__name__)

    st.simulate(len(cut), run)


def stale_row(x):
    r = x[-1]
    x.add_(1)
    return r + 0


def stale_rows(x):
    rows = x.unbind(0)
    x.data.mul_(2)
    return rows[0].clone()


def stale_view_of_the_row(x):
    r = x[5].view(3, 1).t()
    x[5] = 0
    return r.sum()


def stale_base(x):
    y = x.unfold(0, 2, 1)
    y.zero_()
    return x + 0


REFUSED = [stale_row, stale_rows, stale_view_of_the_row, stale_base]


@pytest.mark.parametrize("fn", REFUSED)
@pytest.mark.parametrize("cut", [(4, 3), (6, 1), (0, 5, 2)])
def test_refused_alike(fn, cut):
    def run():
        x = st.distribute_tensor(
            X, T.make_mesh((len(cut),)), [Shard(0)], src_data_rank=None, sizes={0: cut}
        )
        with pytest.raises(st.UnsupportedOpError, match="moved between ranks"):
            fn(x)
        return (x * 1).sum().item() if fn is not stale_base else 0

    assert len(set(st.simulate(len(cut), run))) == 1


GATHERED = {
    "unbind": lambda x: x.unbind(0), "iteration": list, "select": lambda x: [x[-1]],
    "unfold": lambda x: [x.unfold(0, 2, 1)], "flatten": lambda x: [x.t().reshape(-1)],
    "as_strided": lambda x: [x.as_strided((3,), (X.stride(0) + 1,))],
}  # fmt: skip


@pytest.mark.parametrize("name", GATHERED)
@pytest.mark.parametrize("written", [False, True])
def test_memory_that_was_gathered_for_a_view_is_freed(name, written):
    """With what is known of it: no more is stale than before once stale tensors are gone."""
    gc.collect()
    aliases.forget_dead()
    before = set(aliases.stale)

    def run():
        x = st.distribute_tensor(
            X, T.make_mesh((3,)), [Shard(0)], src_data_rank=None, sizes={0: (0, 5, 2)}
        )
        memory = [_torch.storage_ref(y.to_local()) for y in GATHERED[name](x)]
        if written:
            x.add_(1)
        gc.collect()
        assert all(m.expired() for m in memory)

    st.simulate(3, run)
    gc.collect()
    aliases.forget_dead()
    assert set(aliases.stale) <= before


def saved_input(x):
    y = x * 1
    out = Squared.apply(y)
    y.add_(1)
    out.sum().backward()


def saved_output(x):
    out = Squared.apply(x)
    out += 1
    out.sum().backward()


def saved_row(x):
    y = x * 1
    r = y[-1]
    out = r * r
    y.add_(1)
    out.sum().backward()


def base_of_a_written_row(x):
    y = x * 1
    out = (y * y).sum()
    y[-1].mul_(2)
    out.backward()


def written_view_of_a_leaf(x):
    x[-1].add_(1)


def changed_leaf(x):
    x.unfold(0, 2, 1).add_(1)


@pytest.mark.parametrize(
    "fn",
    [saved_input, saved_output, saved_row, base_of_a_written_row, written_view_of_a_leaf, changed_leaf],
)  # fmt: skip
@pytest.mark.parametrize("cut", [(4, 3), (0, 5, 2)])
def test_raises_as_torch_does(fn, cut):
    with pytest.raises(RuntimeError, match=r"modified by an inplace|leaf"):
        fn(X.clone().requires_grad_())

    def run():
        x = st.distribute_tensor(
            X, T.make_mesh((len(cut),)), [Shard(0)], src_data_rank=None, sizes={0: cut}
        )
        with pytest.raises(RuntimeError, match=r"modified by an inplace|leaf"):
            fn(x.requires_grad_())

    st.simulate(len(cut), run)


def raw_memory():
    x = st.distribute_tensor(X, T.make_mesh((2,)), [Shard(0)], src_data_rank=None)
    plain = torch.zeros(7, 3, dtype=D)
    model = nn.Linear(3, 7, bias=False, dtype=D)

    def assign():
        plain.data = x

    for take in (
        assign,
        lambda: nn.utils.vector_to_parameters(x.reshape(-1), model.parameters()),
        lambda: to_dlpack(x),
        lambda: torch.from_dlpack(x),
    ):
        with pytest.raises(st.UnsupportedOpError, match=r"full_tensor|to_local"):
            take()
    plain.data = X
    T.same(plain, X, "plain data is still set")


def test_no_one_reads_memory_that_is_not_there():
    st.simulate(2, raw_memory)


def addends_written():
    mesh = T.make_mesh((2,))
    part = st.distribute_tensor(X, mesh, [Shard(0)], src_data_rank=None).redistribute(
        placements=[Partial()]
    )
    part.mul_(2).add_(1)
    T.same(part, X * 2 + 1, "addends")
    leaf = part.detach().redistribute(placements=[Partial()]).requires_grad_()
    with pytest.raises(RuntimeError, match="leaf"):
        leaf.add_(1)


def test_addends_are_added_up_before_a_write():
    st.simulate(2, addends_written)


def sums_in_place(x):
    a = x * 1
    whole, rows = a.sum(), a.sum(0, keepdim=True)
    whole = whole.unsqueeze(0)
    for y in (whole, rows, a.mean(), a @ a.t() @ a):
        y.unsqueeze_(0)
        y.add_(1)
    rows.squeeze_()
    (whole.sum() + (rows * rows).sum()).backward()
    return rows, x.grad


@pytest.mark.parametrize("cut", [(7,), (4, 3), (0, 5, 2)])
def test_sums_over_ranks_are_changed_in_place(cut):
    want = sums_in_place(X.clone().requires_grad_())

    def run():
        x = st.distribute_tensor(
            X, T.make_mesh((len(cut),)), [Shard(0)], src_data_rank=None, sizes={0: cut}
        )
        for g, w in zip(sums_in_place(x.requires_grad_()), want, strict=True):
            T.same(g, w, "sums")

    st.simulate(len(cut), run)


def view_without_gradients(x):
    a = x * 1
    with torch.no_grad():
        d = a.unfold(0, 2, 1)
    a[0].unsqueeze_(0)
    return d + 0


@pytest.mark.parametrize("cut", [(7,), (4, 3), (0, 5, 2)])
def test_views_made_without_gradients_are_not_read_after_a_write(cut):
    with pytest.raises(RuntimeError, match="no_grad"):
        view_without_gradients(X.clone().requires_grad_())

    def run():
        x = st.distribute_tensor(
            X, T.make_mesh((len(cut),)), [Shard(0)], src_data_rank=None, sizes={0: cut}
        )
        with pytest.raises(RuntimeError, match=r"no_grad|moved between ranks"):
            view_without_gradients(x.requires_grad_())

    st.simulate(len(cut), run)


def test_an_index_out_of_bounds_raises_on_empty_shards():
    def run():
        x = st.distribute_tensor(
            X, T.make_mesh((2,)), [Shard(1)], src_data_rank=None, sizes={1: (0, 3)}
        )
        for wrong in ([0, 7], [-8, 1]):
            with pytest.raises(IndexError, match="out of bounds"):
                x[wrong] = 0
            with pytest.raises(IndexError, match="out of bounds"):
                x[wrong]

    st.simulate(2, run)


@pytest.mark.parametrize("sizes", [(2, 0, 4), (0, 2, 4), (0, 0, 6), (4, 2)])
def test_windows_are_a_view_on_ranks_without_rows_too(sizes):
    """One that took them for a copy would raise alone, or leave the others' backward."""
    rows = torch.linspace(-1, 1, 48, dtype=D).view(6, 8)

    def run(x, whole):
        x.requires_grad_()
        w = torch.tensor([0.3, 0.7], dtype=x.dtype, requires_grad=True)
        y = x * 1
        v = y.unfold(0, 2, 2)
        y.mul_(3)
        v.mul_(w).add_(w * w)
        loss = y.sin().sum() + v.square().sum()
        first = torch.autograd.grad(loss, [x, w], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, w])
        return [whole(t.detach()) for t in (y, v, *first, *second)]

    want = run(rows.clone(), lambda t: t)

    def sharded():
        mesh = T.make_mesh((len(sizes),))
        x = st.distribute_tensor(rows, mesh, [Shard(0)], src_data_rank=None, sizes={0: sizes})
        return run(x, lambda t: t.full_tensor() if isinstance(t, st.ShardTensor) else t)

    for found in st.simulate(len(sizes), sharded):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)

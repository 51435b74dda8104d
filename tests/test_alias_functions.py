"""Writes that pass by Functions, checkpoints, copies, out= and partial sums, against plain PyTorch."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Partial, Shard
from torch.utils.checkpoint import checkpoint

import shardtensor as st
from shardtensor import testing as T

D = torch.float64
X = torch.arange(24, dtype=D).reshape(6, 4).sin() + 0.1
CUTS = [(4, 2), (3, 0, 2, 1)]


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        x.mul_(3)
        return x

    @staticmethod
    def backward(ctx, g):
        return g * 3


class Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.mark_dirty(x)
        ctx.save_for_backward(w)
        x.mul_(w)
        return x

    @staticmethod
    def backward(ctx, g):
        (w,) = ctx.saved_tensors
        return g * w, (g * 2).sum(0)


class Flat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view(-1)

    @staticmethod
    def backward(ctx, g):
        return g.view(6, 4)


class SavesUnread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = x * 2
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, g):
        return g * 2


def sharded(cut):
    return st.distribute_tensor(
        X.clone(), T.make_mesh((len(cut),)), [Shard(0)], src_data_rank=None, sizes={0: cut}
    )


def view_changed_by_a_function(x):
    y = x.requires_grad_() * 1
    Tripled.apply(y[1:3])
    y.sum().backward()
    return x.grad, y


def base_changed_by_a_function(x):
    y = x.requires_grad_() * 1
    v = y[1:3]
    z = Tripled.apply(y)
    v.sum().backward()
    assert z is y
    return x.grad, v


def function_that_changes_by_a_weight(x):
    w = torch.arange(1, 5.0, dtype=D).requires_grad_()
    y = x.clone()
    Weighted.apply(y, w).add_(1)
    (y**2).sum().backward()
    return w.grad, y


def saved_result_is_not_read(x):
    out = SavesUnread.apply(x.requires_grad_())
    out.add_(1).sum().backward()
    return x.grad, out


def checkpoint_in_a_checkpoint(x):
    def inner(y):
        return checkpoint(lambda t: (t * t).sin(), y, use_reentrant=False).cos()

    out = checkpoint(inner, x.requires_grad_() * 1, use_reentrant=False)
    (out**2).sum().backward()
    return x.grad, out


def shallow_copy(x):
    y = copy.copy(x)
    y.add_(1)
    return x, y


def out_is_plain(x):
    a, b = torch.empty(0, dtype=D), torch.zeros(6, 4, dtype=D)
    torch.add(x, 1, out=a)
    torch.exp(x.t(), out=b.t())
    return a, b


def indexed_rows_grow(x):
    y = x.requires_grad_() * 1
    b = y[:, 1]
    b[torch.tensor([0, 3])] += 1
    (b**2).sum().backward()
    return x.grad, b


def names_keep_their_shape(x):
    b, c = x[:], x.view(6, 4)
    assert x.to(D) is x and torch.atleast_2d(x) is x
    x.transpose_(0, 1)
    return b + 0, c + 0, x + 0


def items_of_another_size(x):
    y = x.view(torch.float32)
    pairs = x.float().view(torch.complex128)
    x.float().view(D).zero_()
    y[:, 1] = 2.0
    return x, y.t()[3], pairs.real + 0, x.view(torch.uint8)[2:4]


RIGHT = [
    view_changed_by_a_function, base_changed_by_a_function, function_that_changes_by_a_weight,
    saved_result_is_not_read, checkpoint_in_a_checkpoint, shallow_copy, out_is_plain, indexed_rows_grow,
    names_keep_their_shape, items_of_another_size,
]  # fmt: skip


@pytest.mark.parametrize("fn", RIGHT)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.filterwarnings("ignore::shardtensor.FallbackWarning")
def test_right(fn, cut):
    want = fn(X.clone())

    def run():
        for g, w in zip(fn(sharded(cut)), want, strict=True):
            T.same(g, w, fn.__name__)

    st.simulate(len(cut), run)


def leaf_changed_by_a_function(x):
    Tripled.apply(x.requires_grad_())


def view_of_a_function_written(x):
    z = Flat.apply(x.requires_grad_() * 1)
    z.mul_(3)


def checkpoint_changes_its_input(x):
    out = checkpoint(lambda y: y.mul_(2).exp(), x.requires_grad_() * 1, use_reentrant=False)
    out.sum().backward()


def input_of_a_checkpoint_changed(x):
    y = x.requires_grad_() * 1
    out = checkpoint(lambda t: (t * t).sin(), y[3:], use_reentrant=False)
    y.add_(1)
    out.sum().backward()


def another_row_written(x):
    y = x.requires_grad_() * 1
    out = y[2] ** 2
    y[3] = 0
    out.sum().backward()


RAISES = [
    leaf_changed_by_a_function, view_of_a_function_written, checkpoint_changes_its_input,
    input_of_a_checkpoint_changed, another_row_written,
]  # fmt: skip


@pytest.mark.parametrize("fn", RAISES)
@pytest.mark.parametrize("cut", CUTS)
def test_raises_as_torch_does(fn, cut):
    told = "modified by an inplace|being modified inplace|leaf Variable"
    with pytest.raises(RuntimeError, match=told):
        fn(X.clone())

    def run():
        with pytest.raises(RuntimeError, match=told):
            fn(sharded(cut))

    st.simulate(len(cut), run)


def gathered_row_changed_by_a_function():
    y = sharded((4, 2)).requires_grad_() * 1
    with pytest.raises(st.UnsupportedOpError, match="gathered from another tensor"):
        Tripled.apply(y[4])


def test_a_function_may_not_change_a_gathered_view():
    st.simulate(2, gathered_row_changed_by_a_function)


VIEWS_OF_SUMS = [
    lambda x: x.unfold(0, 2, 2), lambda x: x.diagonal(), lambda x: x.double(), lambda x: x.cpu(),
    lambda x: x.type_as(x), lambda x: x.detach(),
]  # fmt: skip


def views_of_partial_sums():
    mesh = T.make_mesh((2,))
    for view in VIEWS_OF_SUMS:
        # half of it on each rank
        x = st.ShardTensor.from_local(X / 2, mesh, [Partial()])
        y = view(x)
        x.add_(1)
        try:
            got = y * 1
        except st.UnsupportedOpError as e:
            assert "moved between ranks" in str(e) or "partial sums are read" in str(e)
        else:
            T.same(got, view(X + 1), "a view of sums after a write")
        x = st.ShardTensor.from_local(X / 2, mesh, [Partial()])
        view(x).add_(1)
        with pytest.raises(
            st.UnsupportedOpError, match=r"moved between ranks|partial sums are read"
        ):
            x * 1


def test_views_of_partial_sums():
    st.simulate(2, views_of_partial_sums)


def collectives():
    # in processes: simulated ranks have no collectives in C++
    x = sharded((4, 2))
    loss = x.sum()
    for call in (
        lambda: dist.all_reduce(loss),
        lambda: dist.broadcast(x, 0),
        lambda: dist.all_gather([torch.zeros(6, 4, dtype=D)] * 2, x),
    ):
        with pytest.raises(st.UnsupportedOpError, match="whole and alike on all ranks"):
            call()
    T.same(loss, X.sum(), "the loss")


def test_collectives_of_torch_are_refused():
    T.run_workers(2, collectives)


def items_cut_between():
    x = st.distribute_tensor(
        X.float(), T.make_mesh((2,)), [Shard(1)], src_data_rank=None, sizes={1: (1, 3)}
    )
    T.same(x.view(D), X.float().view(D), "a cut within an item moves")
    T.same(x.view(torch.complex128), X.float().view(torch.complex128), "one rank has no item")
    with pytest.raises(RuntimeError, match="divisible"):
        x[:, :3].contiguous().view(D)
    with pytest.raises(RuntimeError, match="stride"):
        x.t().view(D)


def test_items_cut_between():
    st.simulate(2, items_cut_between)

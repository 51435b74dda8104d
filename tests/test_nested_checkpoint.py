"""Checkpoints inside of checkpoints, and Functions inside of them, against the same program on one device."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, simulate

F64 = torch.float64


def layers():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 4), nn.GELU()).double() for _ in range(2)]


def kept(fn, *args, reentrant=False):
    return checkpoint(fn, *args, use_reentrant=reentrant)


PROGRAMS = {
    "twice": lambda a, b, x: kept(lambda x: kept(a, x) + 0, x),
    "nothing outside": lambda a, b, x: kept(kept, a, x),
    "thrice": lambda a, b, x: kept(lambda x: kept(lambda x: kept(b, a(x)) * x, x).sin(), x),
    "each": lambda a, b, x: kept(lambda x: kept(b, kept(a, x)) * x, x),
    "two inputs": lambda a, b, x: kept(
        lambda x, w: kept(lambda x, y: a(x) * y, x, w) + x, x, b[0].weight[:, 0]
    ),
    "matmul": lambda a, b, x: kept(lambda x: kept(lambda x: x @ x.T @ x, x).sin(), x),
    "sequential": lambda a, b, x: kept(
        lambda x: checkpoint_sequential([a, b], 2, x, use_reentrant=False), x
    ),
    "reentrant inside": lambda a, b, x: kept(lambda x: kept(a, x * 2, reentrant=True) + 0, x),
    "reentrant outside": lambda a, b, x: kept(lambda x: kept(a, x * 2) + 0, x, reentrant=True),
}


def gradients(name, x, twice):
    a, b = layers()
    x = x.requires_grad_()
    y = PROGRAMS[name](a, b, x)
    loss = (y**2).sum()
    if twice:
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = (g**2).sum()
    loss.backward()
    found = [y, x.grad, a[0].weight.grad, b[0].weight.grad]
    return [t.full_tensor().detach() if isinstance(t, st.ShardTensor) else t for t in found]


@pytest.mark.parametrize("place", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_nested_checkpoints(name, place):
    x = torch.linspace(-1, 1, 28, dtype=F64).reshape(7, 4)
    reentrant = name.startswith("reentrant")
    for twice in (False,) if reentrant else (False, True):
        want = gradients(name, x.clone(), twice)

        def on_rank(twice=twice):
            mesh = make_mesh((3,))
            return gradients(name, st.distribute_tensor(x.clone(), mesh, [place]), twice)

        for found in simulate(3, on_rank):
            for g, w in zip(found, want, strict=True):
                if w is None:
                    assert g is None
                else:
                    torch.testing.assert_close(g, w.detach(), rtol=1e-9, atol=1e-12)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


def test_second_derivatives_of_a_function_inside_a_checkpoint_are_refused():
    """What a hook saved has no history: the second derivative would lack a part."""

    def on_rank():
        x = torch.arange(6, dtype=F64)
        x = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)]).requires_grad_()
        y = kept(lambda x: Square.apply(x * x), x)
        (g,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        torch.testing.assert_close(g.full_tensor(), 4 * torch.arange(6, dtype=F64) ** 3)
        y = kept(lambda x: Square.apply(x * x), x)
        with pytest.raises(st.UnsupportedOpError, match="second derivatives through"):
            torch.autograd.grad(y.sum(), x, create_graph=True)

    simulate(2, on_rank)


NORMS = {
    "batch": nn.BatchNorm2d(4, dtype=F64),
    "instance": nn.InstanceNorm2d(4, affine=True, track_running_stats=True, dtype=F64),
}


def last_in_a_checkpoint(norm, x):
    """What a checkpoint repeats ends with the last tensor that is saved: inside the norm."""
    norm = copy.deepcopy(norm)
    kept(norm, x.requires_grad_()).square().sum().backward()
    return [x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]


@pytest.mark.parametrize("place", [Shard(0), Shard(1), Shard(2)], ids=str)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_running_statistics_move_as_often_as_on_one_device(norm, place):
    x = torch.linspace(-1, 3, 2 * 4 * 15, dtype=F64).sin().reshape(2, 4, 5, 3)
    want = last_in_a_checkpoint(norm, x.clone())

    def on_rank():
        mine = st.distribute_tensor(x, make_mesh((2,)), [place])
        g, *others = last_in_a_checkpoint(norm, mine)
        return [g.full_tensor(), *others]

    for found in simulate(2, on_rank):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def selected(model, x):
    """The convolutions' results are kept, the rest is computed again."""
    saved = [torch.ops.aten.convolution.default]
    y = checkpoint(
        model, x.requires_grad_(), use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(saved),
    )  # fmt: skip
    y.square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def test_a_rank_does_not_see_what_it_moves_for_the_others():
    """Or it would not find it again when it repeats what it did, after another has moved it."""

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.GELU(), nn.Conv2d(3, 2, 3)
        )
        return model.double(), torch.randn(2, 2, 7, 5, dtype=F64)

    want = selected(*made())

    def on_rank():
        model, x = made()
        g, *others = selected(model, st.distribute_tensor(x, make_mesh((3,)), [Shard(2)]))
        return [g.full_tensor(), *others]

    for found in simulate(3, on_rank):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def selected_again(x, rows, saved):
    """What a selective checkpoint of a transform and of rows by number gives."""

    def region(x):
        y = torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:])
        return y.index_select(1, rows).sin() + torch.tensor([2.0, 3.0, 0.5])

    y = checkpoint(
        region, x.requires_grad_(), use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(saved),
    )  # fmt: skip
    y.square().sum().backward()
    return [y, x.grad]


@pytest.mark.parametrize("name", ["sin", "_fft_r2c"])
def test_a_selective_checkpoint_does_not_see_what_is_made_once(name):
    """What is repeated finds it made: ops after it would be given the results of others."""
    saved = [getattr(torch.ops.aten, name).default]
    x = torch.linspace(-1, 3, 7 * 6 * 3, dtype=F64).sin().reshape(7, 6, 3)
    rows = torch.tensor([5, 0, 3, 3, 1])
    want = selected_again(x.clone(), rows, saved)

    def on_rank():
        mesh = make_mesh((2,))
        mine = [st.distribute_tensor(t, mesh, [Shard(t.ndim // 2)]) for t in (x, rows)]
        return [t.full_tensor() for t in selected_again(*mine, saved)]

    for found in simulate(2, on_rank):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def rows_set_first(values, at, nodes):
    """In a checkpoint rows are set of which nothing tells how they lie; after it others are read."""

    def region(values):
        y = torch.zeros(nodes.shape, dtype=F64)
        y[at] = values
        return y.sin() * y

    y = kept(region, values.requires_grad_())
    (y.sum() + nodes[at].sum()).backward()
    return [y, values.grad]


def test_what_was_learnt_after_a_checkpoint_is_unknown_where_it_is_repeated():
    values = torch.linspace(-1, 1, 27, dtype=F64).reshape(9, 3)
    at, nodes = torch.arange(9) * 7 % 11, torch.linspace(0, 1, 33, dtype=F64).reshape(11, 3)
    want = rows_set_first(values.clone(), at, nodes)

    def on_rank():
        mesh = make_mesh((2,))
        mine = [st.distribute_tensor(t, mesh, [Shard(0)]) for t in (values, at, nodes)]
        return [
            t.full_tensor() if isinstance(t, st.ShardTensor) else t for t in rows_set_first(*mine)
        ]

    for found in simulate(2, on_rank):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)

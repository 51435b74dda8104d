"""Checkpoints inside of checkpoints, and Functions inside of them, against the same program on one device."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

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

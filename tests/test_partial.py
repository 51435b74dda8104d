"""Addends: what is made of them counts once, and so do their gradients, of every order."""

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, same, simulate

# few bits, so that the sum of the addends is exact
X = (torch.randn(6, 4, generator=torch.Generator().manual_seed(1)) * 64).round().double() / 64
LAYOUTS = {
    "sum": ((2,), (Partial(),)), "sum of three": ((3,), (Partial(),)),
    "sharded and sum": ((2, 2), (Shard(0), Partial())), "sum and sharded": ((2, 2), (Partial(), Shard(1))),
    "two sums": ((2, 2), (Partial(), Partial())), "mean": ((2,), (Partial("avg"),)),
}  # fmt: skip


def addends(mesh, placements, x=X):
    """A leaf of which this rank holds an addend."""
    kept = [Replicate() if p.is_partial() else p for p in placements]
    local = st.distribute_tensor(x, mesh, kept, src_data_rank=None).to_local()
    for axis, p in enumerate(placements):
        if p.is_partial():
            n = mesh.size(axis)
            first = n if p.reduce_op == "avg" else 1
            # unequal addends, that others take back
            weight = 3 + first if mesh.get_local_rank(axis) == 0 else -3 / (n - 1)
            local = local * weight
    return st.ShardTensor.from_local(local, mesh, placements).requires_grad_()


def on_ranks(layout, fn):
    shape, placements = LAYOUTS[layout]

    def run():
        mesh = make_mesh(shape)
        fn(addends(mesh, placements), mesh, placements)

    size = 1
    for n in shape:
        size *= n
    simulate(size, run)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "fn",
    [
        torch.ones_like, torch.zeros_like, lambda x: torch.full_like(x, 3.0), lambda x: x.new_ones(6, 4),
        lambda x: x.new_full((6, 4), 2.0), lambda x: x.reshape(3, 2, 4), lambda x: x.reshape(-1), lambda x: x.view(4, 6),
        lambda x: x.flatten(), lambda x: x.unflatten(1, (2, 2)), lambda x: x.t().reshape(8, 3), lambda x: x.view(torch.int64),
        lambda x: x[1:5], lambda x: x[2], lambda x: x.expand(2, 6, 4), lambda x: x.unsqueeze(1).squeeze(1), lambda x: x.unbind(0)[3],
        lambda x: x.split(2)[1], lambda x: x.clone(), lambda x: x.contiguous(), lambda x: x.detach() * 2,
    ],
)  # fmt: skip
def test_made_of_addends(layout, fn):
    def check(x, mesh, placements):
        same(fn(x).detach(), fn(X), "value", 1e-12, 1e-12)

    on_ranks(layout, check)


def cubed(x):
    return (x.reshape(3, 8) ** 3).sum()


def wanted():
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(cubed(x), x, create_graph=True)
    (h,) = torch.autograd.grad((g * g).sum(), x)
    return g.detach(), h


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_count_once(layout):
    first, second = wanted()

    def check(x, mesh, placements):
        (g,) = torch.autograd.grad(cubed(x), x, create_graph=True)
        same(g, first, "gradient", 1e-11)
        (h,) = torch.autograd.grad((g * g).sum(), x)
        same(h, second, "second derivative", 1e-11)
        # the same by .grad, and by a hook that sees the gradient
        cubed(x).backward(create_graph=True)
        seen = []
        x.register_hook(lambda g: seen.append(g))
        (g,) = torch.autograd.grad(cubed(x), x, create_graph=True)
        for found in (x.grad, *seen):
            (h,) = torch.autograd.grad((found * found).sum(), x, retain_graph=True)
            same(h, second, "second derivative", 1e-11)

    on_ranks(layout, check)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_made_addends_differentiate_twice(layout):
    """Replicated values as addends and back, and a cotangent that needs a gradient itself."""
    first, second = wanted()

    def check(x, mesh, placements):
        whole = st.distribute_tensor(X, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
        whole.requires_grad_()
        (g,) = torch.autograd.grad(
            cubed(whole.redistribute(placements=placements)), whole, create_graph=True
        )
        same(g, first, "gradient", 1e-11)
        (h,) = torch.autograd.grad((g * g).sum(), whole)
        same(h, second, "second derivative", 1e-11)
        v = torch.ones_like(X).requires_grad_()
        (g,) = torch.autograd.grad(x.clone(), x, v, create_graph=True)
        (back,) = torch.autograd.grad((g * X).sum(), v)
        same(back, X, "gradient of a cotangent", 1e-11)

    on_ranks(layout, check)


@pytest.mark.parametrize("layout", ["sum", "sharded and sum"])
def test_sums_lie_as_their_addends(layout):
    """So the same reshapes are views, through which others see writes."""

    def written(x):
        y = x.t() * 1
        flat = y.reshape(-1)
        flat += 1
        last = y.t().contiguous()
        last *= 2
        return y, flat, last, x.expand(2, *x.shape) * 1

    def run():
        shape, placements = LAYOUTS[layout]
        found = written(addends(make_mesh(shape), placements).detach())
        for got, want in zip(found, written(X), strict=True):
            same(got, want, "written")
            assert got.stride() == want.stride()

    simulate(torch.Size(LAYOUTS[layout][0]).numel(), run)

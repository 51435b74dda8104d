"""Where torch.func and forward mode meet what is no torch function: right, or refused; never a zero."""

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch.distributed.tensor import Shard
from torch.func import grad, jvp, vmap

import shardtensor as st
from shardtensor.ranks.testing import full, make_mesh, simulate

D = torch.float64
X = torch.linspace(-1, 2, 24, dtype=D).reshape(8, 3).sin()
ROWS = torch.tensor([[0, 2, 4], [1, 7, 3], [5, 0, 2]])


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_forward(x, w)
        return x**3 * w

    @staticmethod
    def jvp(ctx, t, u):
        x, w = ctx.saved_tensors
        return (0 if t is None else 3 * x**2 * w * t) + (0 if u is None else x**3 * u)


def dual(f):
    def derived(x):
        with fw.dual_level():
            return fw.unpack_dual(f(fw.make_dual(x, x.cos()))).tangent

    return derived


def beside(x):
    """The tangent is of a plain operand."""
    w = torch.ones(3, dtype=D)
    return dual(lambda v: Cube.apply(x, v))(w)


def many(f):
    """f of three samples, which lie along a dim that is whole, and of rows of each."""
    return lambda x: vmap(f)(torch.stack([x, x * 2, x.exp()]), ROWS)


def made(x):
    placed = getattr(x, "placements", None)
    if placed is None:
        return jvp(lambda a: a.sum(), (X,), (X,))
    put = lambda a: st.distribute_tensor(a, x.device_mesh, placed, src_data_rank=None)  # noqa: E731
    return jvp(lambda a: put(a).sum(), (X,), (X,))


REFUSED = {
    "a Function's jvp": (dual(lambda x: Cube.apply(x, X[0])), "Cube, an autograd.Function"),
    "a Function of a plain tangent": (beside, "Cube, an autograd.Function"),
    "as_tensor": (
        grad(lambda x: torch.as_tensor(x).sum()),
        "torch calls on a ShardTensor by itself",
    ),
    "a leaf": (made, "distribute_tensor of a tensor with a tangent"),
    "rows of a batch": (many(lambda a, i: a[i]), "torch.func or forward mode through __getitem__"),
    "rows filled": (many(lambda a, i: a.index_fill(0, i, 2.0)), "through index_fill"),
    "scatter": (many(lambda a, i: a.scatter(0, i[:, None], 5.0)), "through scatter"),
    "take_along_dim": (many(lambda a, i: torch.take_along_dim(a, i[:, None], 0)), "take_along_dim"),
    "the older vmap": (
        lambda x: torch.autograd.functional.jacobian(
            lambda w: (x * w).sum(0), X[0], vectorize=True, strategy="forward-mode"
        ),
        # the strict transport sums in a Function, which is asked first
        "vectorize=True|take torch.autograd.grad",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(name):
    call, why = REFUSED[name]
    call(X)

    def on_rank():
        x = st.distribute_tensor(X, make_mesh((3,)), [Shard(0)], sizes={0: (5, 0, 3)})
        with pytest.raises(st.UnsupportedOpError, match=why):
            call(x)
        assert (x * 2).full_tensor().shape == X.shape  # nothing is left switched on

    simulate(3, on_rank)


RIGHT = {
    "a draw": lambda x: jvp(lambda a: (a + torch.rand_like(x) * 0).sum(), (x,), (x,)),
    "a draw in grad": lambda x: grad(lambda w: (x * w + torch.randn_like(x) * 0).sum())(X[0]),
    "a draw in vmap": lambda x: vmap(lambda w: x * w + torch.randn_like(x) * 0, randomness="same")(
        X
    ),
    "new_tensor": lambda x: grad(lambda w: (x * w * x.new_tensor([2.0])).sum())(X[0]),
    "distributed inside": lambda x: grad(lambda w: (like(x) * w).sum())(X[0]),
}


def like(x):
    whole = torch.ones(8, 3, dtype=D)
    mesh = getattr(x, "device_mesh", None)
    if mesh is None:
        return whole
    return st.distribute_tensor(whole, mesh, x.placements, src_data_rank=None)


@pytest.mark.parametrize("name", RIGHT)
def test_made_inside_of_a_transform(name):
    wants = torch.utils._pytree.tree_leaves(RIGHT[name](X))

    def on_rank():
        x = st.distribute_tensor(X, make_mesh((2,)), [Shard(0)])
        found = torch.utils._pytree.tree_leaves(RIGHT[name](x))
        for got, want in zip(found, wants, strict=True):
            torch.testing.assert_close(full(got), want, rtol=1e-9, atol=1e-9)

    simulate(2, on_rank)


@pytest.mark.parametrize("forward", [dual, lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1]])
def test_a_rank_is_in_forward_mode_as_long_as_it_is(forward):
    """Ranks leave it one after the other; what follows on one is as on those that wait in it."""

    def norm(x):
        return torch.nn.functional.layer_norm(x, x.shape)

    def run(x):
        tangent = forward(norm)(x)
        x = x.detach().requires_grad_()
        (again,) = torch.autograd.grad((norm(x) ** 3).sum(), x)
        return tangent, again

    def main():
        x = st.distribute_tensor(X, make_mesh((3,)), [Shard(0)], sizes={0: (5, 0, 3)})
        return [full(y) for y in run(x)]

    for found in simulate(3, main):
        torch.testing.assert_close(found, list(run(X)), rtol=0, atol=1e-9)

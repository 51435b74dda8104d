"""Results that are written to: torch's error where its backward needs them; arrays that are copies."""

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.nn import functional as F

import shardtensor as st
from shardtensor.attention import strategy
from shardtensor.testing import make_mesh, same, simulate

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)
EYE = 3 * torch.eye(4, dtype=torch.float64)
NEEDED = {
    "softmax": lambda x: x.softmax(0),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "logsumexp": lambda x: x.logsumexp(0),
    "amax": lambda x: x.amax(0),
    "amin of all": lambda x: x.amin(),
    "aminmax": lambda x: torch.aminmax(x, dim=0)[1],
    "norm": lambda x: x.norm(dim=1),
    "vector_norm": lambda x: torch.linalg.vector_norm(x),
    "std": lambda x: x.std(0),
    "prod": lambda x: x.prod(1),
    "cumprod": lambda x: x.cumprod(0),
    "dist": lambda x: torch.dist(x, x + 1),
    "inv": lambda x: torch.linalg.inv(x[:, :4] + EYE),
    "exp": lambda x: x.exp(),
}  # fmt: skip
CUTS = [(0, (2, 2)), (0, (1, 3)), (0, (4, 0)), (1, (3, 3))]


@pytest.mark.parametrize("dim, sizes", CUTS)
@pytest.mark.parametrize("name", NEEDED)
def test_a_result_that_backward_needs_was_changed(name, dim, sizes):
    def fail(x):
        y = NEEDED[name](x * 1)
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def run():
        x = st.distribute_tensor(
            X, make_mesh((2,)), [Shard(dim)], sizes={dim: sizes}
        ).requires_grad_()
        fail(x)
        # one that is left alone is right, twice
        y = NEEDED[name](x)
        z = y * 2
        z.add_(1)
        first, second = (torch.autograd.grad(z.sum(), x, retain_graph=True)[0] for _ in range(2))
        plain = X.clone().requires_grad_()
        (want,) = torch.autograd.grad(2 * NEEDED[name](plain).sum(), plain)
        same(first, want, name, 1e-9, 1e-12)
        same(second, want, name, 1e-9, 1e-12)

    fail(X.clone().requires_grad_())
    simulate(2, run)


@pytest.mark.parametrize("way", ["gather", "ring"])
@pytest.mark.parametrize("sizes", [(2, 2), (4, 0)])
def test_attention_that_backward_needs_was_changed(sizes, way):
    """A kernel's backward reads its result: torch says so, on ranks without rows, too."""
    want = F.scaled_dot_product_attention(X[None], X[None], X[None]) + 1

    def run():
        x = st.distribute_tensor(X, make_mesh((2,)), [Shard(0)], sizes={0: sizes}).requires_grad_()
        with strategy(way):
            y = F.scaled_dot_product_attention(x[None], x[None], x[None])
        other = y.clone().add_(1)
        same(other, want, "value", 1e-9, 1e-12)
        other.sum().backward(retain_graph=True)
        y.add_(1)
        same(y, want, "value", 1e-9, 1e-12)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    simulate(2, run)


@pytest.mark.parametrize("transport", ["plain", "strict"])
def test_an_array_of_a_sharded_tensor_is_a_copy_that_misses_no_write(transport):
    def run():
        mesh = make_mesh((2,))
        x = st.distribute_tensor(X, mesh, [Shard(0)])
        array = x.numpy()
        with pytest.raises(ValueError, match="read-only"):
            array += 1
        with pytest.raises(st.UnsupportedOpError, match="array"):
            x.add_(1)
        own = array[1:].copy()
        del array
        same(x.add_(1), X + 1, "written")
        assert (own == X.numpy()[1:]).all()
        assert np.array(x).flags.writeable
        same(x.mul_(2), (X + 1) * 2, "no array is left")
        whole = st.distribute_tensor(X, mesh, [Replicate()])
        shared = whole.numpy()
        shared += 1
        same(whole, X + 1, "memory that is one")

    simulate(2, run, transport=transport)


def test_what_asks_for_memory_is_refused():
    def run():
        x = st.distribute_tensor(X, make_mesh((2,)), [Shard(0)])
        with pytest.raises(st.UnsupportedOpError, match="storage_offset"):
            x[1:].storage_offset()
        with pytest.raises(st.UnsupportedOpError, match="as_subclass of a ShardTensor"):
            x.as_subclass(type("Sub", (torch.Tensor,), {}))

    simulate(2, run)


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad * ctx.saved_tensors[0]


@pytest.mark.parametrize("sizes", [(2, 2), (4, 0)])
def test_gradcheck(sizes):
    def run():
        x = st.distribute_tensor(X[:, :2], make_mesh((2,)), [Shard(0)], sizes={0: sizes})
        x.requires_grad_()
        for fn in (lambda x: (x * x).sum(), lambda x: x.flip(0).softmax(0)):
            assert torch.autograd.gradcheck(fn, (x,))
            assert torch.autograd.gradcheck(fn, (x,), fast_mode=True)
        with pytest.raises(
            torch.autograd.gradcheck.__globals__["GradcheckError"], match="mismatch"
        ):
            torch.autograd.gradcheck(Wrong.apply, (x,))

    simulate(2, run)


def test_a_value_of_another_size_raises_on_all_ranks():
    """Also where what a rank has of both fits by chance."""

    def run():
        x = st.distribute_tensor(torch.zeros(2, 8), make_mesh((2,)), [Shard(1)], src_data_rank=None)
        v = x[:, :3] + 1
        for write in (
            lambda: x[:, -1:].copy_(v),
            lambda: x.__setitem__((slice(None), slice(1)), v),
        ):
            with pytest.raises(RuntimeError, match="must match the existing size"):
                write()

    st.simulate(2, run)

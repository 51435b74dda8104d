"""gather, scatter, index_*: input, index and source each plain or sharded in any dim."""

import itertools

import pytest
import torch
from cases.scatter import C, N, distinct, many, rows, ties, values, x
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64

# reduce="add" and "multiply" have no gradient for the source in torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64])
def test_dtypes(dtype):
    a, v = (3 * x).to(dtype), (3 * values).to(dtype)
    on, rtol = (T.shard(0), T.shard(0), T.shard(0)), 2e-2 if dtype is torch.bfloat16 else None
    T.hold(lambda x, i: (x[i], x.gather(0, many)), [a, rows], on[:2], (2,), rtol=rtol)
    T.hold(lambda x, i, v: (x.index_add(0, i, v), x.index_copy(0, distinct, v[:4])), [a, rows, v],
        on, (2,), rtol=rtol)  # fmt: skip


def in_place(x, i, v):
    y = x * 1
    y.index_add_(0, i, v)
    y.scatter_add_(0, i[:, None, None].expand(v.shape), v)
    y.index_fill_(1, i[:1] % C, 2.0)
    y.index_put_((i,), v, accumulate=True)
    z = (y * 2).scatter_reduce_(0, many, ties, "amax")
    return y.index_copy_(0, distinct, v[:4]), z


def test_in_place():
    for on in itertools.product(*[(None, T.shard(0))] * 3):
        if any(on):
            T.hold(in_place, [x, rows, values], on, (2,))


def graph(x, i):
    """Messages pass along edges: the mean of what comes in."""
    out = torch.zeros(N, C, 3, dtype=x.dtype)
    total = out.index_add(0, i.roll(1), x[i] ** 2)
    return total / torch.zeros(N, dtype=x.dtype).index_add(0, i, torch.ones_like(i, dtype=x.dtype)
    ).clamp(min=1)[:, None, None]  # fmt: skip


def test_graph():
    for on in ((T.shard(0), T.shard(0)), (None, T.shard(0)), (T.shard(0), None)):
        T.hold(graph, [x, rows], on, (3,))


def test_double_backward():
    def fn(x, i, v):
        y = x.index_add(0, i, v**2)[i] ** 2
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return g * v.mean()

    T.hold(fn, [x, rows, values], [T.shard(0), T.shard(0), T.shard(0)], (3,))


def errors():
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    bad = st.distribute_tensor(torch.tensor([0, 1, 9]), mesh, [Shard(0)], src_data_rank=None)
    for call in (
        lambda: s[bad], lambda: s.index_select(0, -bad), lambda: s.index_copy(0, bad, s[:3]),
        lambda: s[bad, 0], lambda: s.take(bad * 99), lambda: s.put(bad * 99, s[0, 0]),
        lambda: s[torch.tensor([8])],
    ):  # fmt: skip
        with pytest.raises(IndexError):
            call()
    # torch raises of some ops one, of others the other
    at, ones = bad[:, None, None], s[:3, :1, :1]
    for call in (
        lambda: s.gather(0, at), lambda: s.scatter(0, at, 1.0), lambda: s.scatter(0, at, ones),
        lambda: s.scatter_add(0, -at, ones), lambda: s.scatter_reduce(0, at, ones, "amax"),
        lambda: s.index_add(0, bad, s[:3]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="out of bounds"):
            call()
    with pytest.raises(RuntimeError):
        s.gather(0, torch.zeros(1, C + 1, 1, dtype=torch.long))
    with pytest.raises(RuntimeError):
        s.index_add(0, torch.tensor([1]), s[:2])


def test_errors():
    st.simulate(2, errors)


def sent():
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    with st.trace() as t:
        s.gather(1, torch.zeros(N, 1, 1, dtype=torch.long))
        s[:, [0, 1]]
        s.index_add(1, torch.tensor([0]), s[:, :1])
        s.index_fill(0, rows, 1.0)
    assert not t.bytes
    with st.trace() as t:
        s.index_add(0, rows, values)
    assert not t.bytes
    near = torch.tensor([0, 1, 6, 5])
    i = st.distribute_tensor(near, mesh, [Shard(0)], src_data_rank=None)
    with st.trace() as t:
        s[i]
    # who asks how much, and whether all are in range; no row moves
    assert t.bytes <= 2 * 8 * 2, t.bytes


def test_sent():
    st.simulate(2, sent)


def compiled():
    mesh = T.make_mesh((2,))

    def fn(x, i, v):
        y = x.index_add(0, i, v * x[i]).scatter_reduce(0, many, ties, "amax")
        return y.index_copy(0, distinct, v[:4]).gather(0, i[:, None, None].expand(-1, C, 3))

    def run(call):
        a, w = (
            st.distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None).requires_grad_()
            for t in (x, values)
        )
        out = call(a, st.distribute_tensor(rows, mesh, [Shard(0)]), w)
        out.square().sum().backward()
        return out, a.grad, w.grad

    for got, want in zip(run(st.compile(fn, backend="aot_eager")), run(fn), strict=True):
        T.same(got, want.full_tensor().detach(), "compiled")
    # how many rows a mask has depends on values, so no graph holds it
    by_mask = lambda x, i, v: x[x > 0] + v.sum()  # noqa: E731
    for got, want in zip(run(st.compile(by_mask, backend="aot_eager")), run(by_mask), strict=True):
        T.same(got, want.full_tensor().detach(), "eager")


def test_compiled():
    st.simulate(2, compiled)


@pytest.mark.parametrize("reduce", ["sum", "prod", "mean"])
def test_complex_numbers_have_a_gradient_where_they_are_written(reduce):
    at = torch.tensor([[0, 1, 1, 2], [3, 3, 0, 1]])
    x, y = torch.randn(5, 4, dtype=torch.complex128), torch.randn(2, 4, dtype=torch.complex128)

    def fn(x, y):
        return x.clone().scatter_reduce_(0, at, y, reduce)

    T.hold(fn, [x, y], [T.shard(0, (1, 0, 4)), T.shard(1)], (3,))
    with pytest.raises(st.RankError, match="does not support automatic differentiation"):
        st.simulate(2, lambda: (
            st.distribute_tensor(x, T.make_mesh((2,)), [Shard(0)]).requires_grad_()
            .scatter_reduce(0, at, y, reduce)
        ))  # fmt: skip

"""gather, scatter, index_*: input, index and source each plain or sharded in any dim."""

import itertools

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
N, E, C = 7, 9, 4
x = torch.randn(N, C, 3, dtype=D)
rows = torch.tensor([5, 0, 6, 5, 2, 2, 0, 5, 6])  # 1, 3, 4 untouched
values = torch.randn(E, C, 3, dtype=D)
element = torch.stack([torch.randperm(N)[:5] for _ in range(6)]).t()[:, :, None]
element = element.reshape(5, 3, 2)  # smaller than x in the other dims, no duplicates in a column
many = torch.randint(N, (E, 3, 2))
source = torch.randn(E, 3, 2, dtype=D)
ties = source.round()
larger = torch.randn(E + 1, C, 2, dtype=D)  # no gradients in torch
distinct = torch.randperm(N)[:4]

READS = {
    "index_select": (lambda x, i: x.index_select(0, i), rows),
    "x[i]": (lambda x, i: x[i], rows - 3),
    "x[i, :, i]": (lambda x, i: x[i, :, i % 3], rows),
    "x[:, i]": (lambda x, i: x.mT.transpose(0, 2)[1:3, :, i], rows),
    "x[i of 2 dims]": (lambda x, i: x[i], many[:, :, 0]),
    "x[few]": (lambda x, i: x[i], rows[:1]),
    "x[none]": (lambda x, i: x[i], rows[:0]),
    "gather": (lambda x, i: x.gather(0, i), many),
    "gather last": (lambda x, i: x.transpose(0, 2).gather(2, i.transpose(0, 2)), many),
    "gather rows": (lambda x, i: [x.gather(0, e) for e in (
        i[:, None, None].expand(-1, C, 3), i[:, None, None].expand(-1, 2, 3))], rows),
    "take": (lambda x, i: x.take(i * 11 - 5), many),
    "take_along_dim": (lambda x, i: x.take_along_dim(i[:, :1, :1], 0), many),
}  # fmt: skip
WRITES = {
    "index_add": (lambda x, i, v: x.index_add(0, i, v, alpha=2), rows, values),
    "index_copy": (lambda x, i, v: x.index_copy(0, i, v[:4]), distinct, values),
    "index_fill": (lambda x, i, v: (x.index_fill(0, i, 3.0), x.index_fill(0, i, v[0, 0, 0])),
        rows, values),
    "index_reduce": (lambda x, i, v: [x.index_reduce(0, i, v, r, include_self=s) for r, s in (
        ("prod", True), ("mean", False), ("amax", True), ("amin", False))], rows, values),
    "x[i] = v": (lambda x, i, v: x.index_put((i - 3,), v[:4]), distinct, values),
    "accumulate": (lambda x, i, v: x.index_put((i - 3,), v, accumulate=True), rows, values),
    "accumulate 2": (lambda x, i, v: x.index_put((i, i % C), v[:, 0], accumulate=True), rows,
        values),
    "put": (lambda x, i, v: [x.put(i * 5 - 9, v[:4, 0, 0]), x.put(i, v[:4, 1, 0], accumulate=True)],
        distinct, values),
    "scatter": (lambda x, i, v: [x.scatter(0, i, v[:5]), x.scatter(0, i, 1.5)], element, source),
    "scatter reduce": (lambda x, i, v: [x.scatter(0, i, v, reduce="add"),
        x.scatter(0, i, 2.0, reduce="multiply")], many, source),
    "scatter_add": (lambda x, i, v: x.scatter_add(0, i, v), many, source),
    "scatter rows": (lambda x, i, v: [x.scatter_reduce(0, i[:, None, None].expand_as(v), v, r)
        for r in ("sum", "amax")] + [x.scatter(0, i[:4, None, None].expand(-1, 2, 3), v[:4, :2])],
        torch.cat([distinct, distinct, distinct[:1]]), values),
    "scatter_reduce": (lambda x, i, v: [x.scatter_reduce(0, i, v, r, include_self=s) for r in (
        "sum", "prod", "mean", "amax", "amin") for s in (True, False)], many, ties),
    "scatter last": (lambda x, i, v: x.transpose(0, 2).scatter_reduce(
        2, i.transpose(0, 2), v.transpose(0, 2), "amax"), many, ties),
}  # fmt: skip
# reduce="add" and "multiply" have no gradient for the source in torch
NO_GRAD = {"scatter reduce"}


def places(ndim, size, n):
    """Plain, along the first dim unevenly with an empty shard, along another dim."""
    cut = [size - size // 3, *[0] * (n - 2), size // 3]
    return [None, T.shard(0, cut), *([T.shard(1)] if ndim > 1 else [])]


@pytest.mark.parametrize("name", READS)
def test_reads(name):
    fn, index = READS[name]
    for n in (2, 3):
        for on in itertools.product(places(3, N, n), places(index.ndim, len(index), n)):
            if any(on):
                T.hold(fn, [x, index], on, (n,))


@pytest.mark.parametrize("name", WRITES)
def test_writes(name):
    fn, index, v = WRITES[name]
    for n in (2, 3):
        on_v = places(3, len(v), n)
        on_v = [on_v[1], on_v[2], None] if n == 2 else [None, on_v[1]]
        for on in itertools.product(places(3, N, n), places(index.ndim, len(index), n)[:2], on_v):
            if any(on):
                T.hold(fn, [x, index, v], on, (n,), grad=name not in NO_GRAD)


LAYOUTS = [
    (T.On([Shard(0), Shard(1)]), T.On([Shard(0), Replicate()]), T.On([Shard(0), Shard(0)])),
    (T.On([Shard(0), Shard(0)], {0: (3, 0, 1, 3)}), T.On([Shard(0), Shard(0)]), T.replicated(2)),
    (T.On([Shard(0), Replicate()]), T.On([Replicate(), Shard(0)]), T.On([Shard(1), Shard(0)])),
    (T.On([Replicate(), Shard(1)]), T.On([Shard(0), Shard(0)]), T.On([Shard(0), Shard(0)])),
    (T.On([Shard(1), Shard(0)]), None, None),
    (None, T.On([Shard(0), Replicate()]), T.On([Shard(0), Shard(1)])),
]


@pytest.mark.parametrize("name", [*READS, *WRITES])
def test_meshes(name):
    for on in LAYOUTS:
        if name in READS:
            T.hold(READS[name][0], [x, READS[name][1]], on[:2], (2, 2))
        else:
            fn, index, v = WRITES[name]
            T.hold(fn, [x, index, v], on, (2, 2), grad=name not in NO_GRAD)


@pytest.mark.parametrize("cut", T.cuts(N))
def test_cuts(cut):
    n = len(cut)
    edges = T.shard(0, (*[1] * (n - 1), E - n + 1))
    for name in ("x[i]", "gather", "take", "x[i, :, i]"):
        fn, index = READS[name]
        T.hold(fn, [x, index], [T.shard(0, cut), None], (n,))
        T.hold(fn, [x, index], [T.shard(0, cut), edges], (n,))
    for name in ("index_add", "accumulate", "index_reduce", "scatter_add", "scatter_reduce"):
        fn, index, v = WRITES[name]
        T.hold(fn, [x, index, v], [T.shard(0, cut), None, None], (n,))
        T.hold(fn, [x, index, v], [T.shard(0, cut), edges, None], (n,))


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
        lambda: s[bad], lambda: s.index_select(0, -bad), lambda: s.index_add(0, bad, s[:3]),
        lambda: s[bad, 0], lambda: s.take(bad * 99), lambda: s.put(bad * 99, s[0, 0]),
        lambda: s.gather(0, bad[:, None, None]), lambda: s[torch.tensor([8])],
    ):  # fmt: skip
        with pytest.raises(IndexError):
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
    with pytest.raises(st.UnsupportedOpError, match="compile"):
        run(st.compile(lambda x, i, v: x[x > 0], backend="aot_eager"))


def test_compiled():
    st.simulate(2, compiled)

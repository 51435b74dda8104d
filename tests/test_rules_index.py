"""x[...] and x[...] = v by slices, integers and tensors of indices; parts written back."""

import itertools

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T

torch.manual_seed(0)
D = torch.float64
N = 8
x = torch.randn(N, 5, 3, dtype=D)
i = torch.tensor([6, -1, 0, 2, 3])
j = torch.tensor([[0, 2], [-3, 1]])
v = torch.randn(5, 5, 3, dtype=D)

GET = {
    "one": lambda x, i: x[i],
    "list": lambda x, i: x[[0, -1], 1:],
    "range": lambda x, i: x[range(3)],
    "array": lambda x, i: x[i.new_tensor([1, 1]).numpy() if not hasattr(i, "spec") else [1, 1]],
    "two": lambda x, i: x[i, i % 5],
    "apart": lambda x, i: x[i, :, i % 3],
    "broadcast": lambda x, i: x[i[:, None], torch.arange(2), 1],
    "last": lambda x, i: x[..., i % 3],
    "middle": lambda x, i: x[2:, i % 5],
    "int first": lambda x, i: x[3, :, i % 3],
    "none": lambda x, i: x[None, i, None],
    "steps": lambda x, i: x[::2, i[:2] % 5, ::2],
    "2-d": lambda x, i: x[j],
    "2-d apart": lambda x, i: x[j, 1:3, j],
    "0-d": lambda x, i: x[i[0]],
    "mixed": lambda x, i: x[i[:2], torch.tensor([True, False, False, False, True])],
}
SET = {
    "rows": lambda y, i, v: put(y, i, v),
    "one": lambda y, i, v: put(y, i, v[0]),
    "number": lambda y, i, v: put(y, i, 2),
    "pairs": lambda y, i, v: put(y, (i, i % 5), v[:, 0]),
    "apart": lambda y, i, v: put(y, (i, slice(None), i % 3), v[:, :, 0]),
    "part": lambda y, i, v: put(y, (slice(1, None), i[:3] % 5), v[0, 0]),
    "int": lambda y, i, v: put(y, (3, i % 5), v[:, 0]),
    "leading ones": lambda y, i, v: put(y, i, v[None]),
    "column": lambda y, i, v: put(y, (slice(None), 2, i[3:] % 3), v[0, 0, :2]),
    "basic": lambda y, i, v: put(y, (slice(None), 2), v[0, 0]),
    "row": lambda y, i, v: put(y, (3, ..., 1), v[0, :, 0]),
    "2-d": lambda y, i, v: put(y, torch.tensor([[0, 7], [2, 4]]), v[:4].reshape(2, 2, 5, 3)),
}
PARTS = {
    "slice_scatter": lambda x, v: (x.slice_scatter(v[:3], 0, 2, 7, 2), x.slice_scatter(
        v[:, :1].repeat(2, 1, 1)[:N], 1, -1), x.slice_scatter(v[:0], 0, 4, 2)),
    "select_scatter": lambda x, v: (x.select_scatter(v[0], 0, -1), x.select_scatter(
        v[1:4, :, 0].mT.repeat(2, 1)[:N], 1, 2)),
    "diagonal_scatter": lambda x, v: (x.diagonal_scatter(v[:3, :, 1], 0, 0, 1),
        x[0].diagonal_scatter(v[0, 0, :2], 1), x.diagonal_scatter(v[:, :2, 0], -1, 2, 0)),
    "unsafe": lambda x, v: (*torch.unsafe_split(x, 3), *torch.unsafe_chunk(x, 3, 1),
        *torch.split_with_sizes_copy(x, [1, 7])),
}  # fmt: skip


def put(x, index, value):
    y = x * 1
    y[index] = value
    return y


def on(size, n):
    return [None, T.shard(0, [size - size // 3, *[0] * (n - 2), size // 3])]


@pytest.mark.parametrize("name", GET)
def test_get(name):
    for n in (2, 3):
        for place in itertools.product([*on(N, n), T.shard(1)], on(len(i), n)):
            if any(place):
                T.hold(GET[name], [x, i], place, (n,))


@pytest.mark.parametrize("name", SET)
def test_set(name):
    for n in (2, 3):
        for place in itertools.product(
            [on(N, n)[1], T.shard(1)], on(len(i), n), [*on(len(v), n), T.shard(1)]
        ):
            T.hold(SET[name], [x, i, v], place, (n,))


@pytest.mark.parametrize("name", PARTS)
def test_parts(name):
    for n in (2, 3):
        for place in itertools.product([*on(N, n), T.shard(1)], [*on(len(v), n), T.shard(1)]):
            if any(place):
                T.hold(PARTS[name], [x, v], place, (n,))


@pytest.mark.parametrize("name", [*GET, *SET, *PARTS])
def test_meshes(name):
    places = [
        ([Shard(0), Shard(1)], [Shard(0), Replicate()]), ([Shard(0), Shard(0)], [Shard(0)] * 2),
        ([Replicate(), Shard(2)], [Shard(0), Replicate()]), ([Shard(1), Shard(0)], [Replicate()] * 2),
    ]  # fmt: skip
    for a, b in places:
        if name in GET:
            T.hold(GET[name], [x, i], [T.On(a), T.On(b)], (2, 2))
        elif name in SET:
            T.hold(SET[name], [x, i, v], [T.On(a), T.On(b), None], (2, 2))
        else:
            T.hold(PARTS[name], [x, v], [T.On(a), None], (2, 2))


@pytest.mark.parametrize("cut", T.cuts(N))
def test_cuts(cut):
    place = T.shard(0, cut)
    for name in ("one", "two", "apart", "2-d"):
        T.hold(GET[name], [x, i], [place, None], (len(cut),))
    for name in ("rows", "apart", "int"):
        T.hold(SET[name], [x, i, v], [place, None, None], (len(cut),))
    for name in PARTS:
        T.hold(PARTS[name], [x, v], [place, None], (len(cut),))


def local():
    """A dim that no rank shares with another needs no message, few rows come whole."""
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    with st.trace() as t:
        y = s[:, i % 5]
        s[:, [1, 2]] = 3.0
        s[1:, :, j % 3] = 0.0
        s[i] = v
    assert not t.bytes and y.spec.varying == (0,)
    assert s[[3]].spec.varying == () and s[i].spec.varying == (0,)
    for out in (8, -9, (0, 5)):
        with pytest.raises(IndexError):
            s[out] = 1.0
    with pytest.raises(IndexError):
        s[[0.5]]
    with pytest.raises(IndexError):
        s[i, i, i, i]
    with pytest.raises(RuntimeError):
        s.slice_scatter(v, 0, 1, 2)


def test_local():
    st.simulate(2, local)


def rows_changed(x, w):
    """Rows of a sharded dim are copies, which in-place ops write back."""
    y = x * 1
    y[2] += w
    y[3].add_(w * 2)
    y[-1] *= 2.5
    y[1:, 1:3][2].mul_(3)
    t = y[1]
    t[0] = 5.0
    t.sub_(w)
    y[4] = t + y[1]
    y[0].detach().zero_()
    y.transpose(0, 1)[:, 5].sub_(w)
    z = x.mT * 1
    z[..., 6, 1:, 0] += w[1:3, 0]
    return y, t, z


def rows_refused():
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    row, other, same = s[1], s[2], s[1]
    row.add_(1)
    with pytest.raises(st.UnsupportedOpError, match="take it anew"):
        same.add_(1)
    other.add_(1)
    T.same(s[1:3], x[1:3] + 1, "rows")
    torch.sin(s[0], out=row)
    T.same(s[1], x[0].sin(), "row")
    nested = st.distribute_tensor(x.clone(), mesh, [Shard(0)], src_data_rank=None)[1]
    nested.add_(1)
    T.same(nested, x[1] + 1, "the base is gone")
    leaf = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None).requires_grad_()
    with pytest.raises(RuntimeError, match="leaf"):
        leaf[1] += 1


def test_rows_are_written_back():
    w = v[0]
    for cut in T.cuts(N):
        for place in (None, T.shard(0)):
            T.hold(rows_changed, [x, w], [T.shard(0, cut), place], (len(cut),))
    for a in ([Shard(0), Shard(1)], [Shard(0), Shard(0)], [Replicate(), Shard(0)]):
        T.hold(rows_changed, [x, w], [T.On(a), None], (2, 2))
    st.simulate(2, rows_refused)

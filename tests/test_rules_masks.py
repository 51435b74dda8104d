"""Masks, nonzero, repeats: results sharded in sizes that depend on values."""

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
whole = x > 0.3
rows = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
pairs = whole[..., 0]
columns = torch.tensor([0, 1, 1, 0, 1], dtype=torch.bool)
none = torch.zeros(N, dtype=torch.bool)
repeats = torch.tensor([2, 0, 1, 3, 0, 0, 1, 2])
v = torch.randn(int(rows.sum()), 5, 3, dtype=D)

SELECT = {
    "masked_select": (lambda x, m: x.masked_select(m), whole),
    "masked_select broadcast": (lambda x, m: x.masked_select(m[:, None, None]), rows),
    "x[x > 0]": (lambda x, m: x[m] * x[x > 0][:1], whole),
    "x[rows]": (lambda x, m: (x[m], x[m] * 2), rows),
    "x[pairs]": (lambda x, m: x[m], pairs),
    "x[nothing]": (lambda x, m: x[m], none),
    "x[:, columns]": (lambda x, m: x[:, m[:5] | m[3:]], rows),
    "x[:, pairs]": (lambda x, m: x[:, m[0]], whole),
    "x[rows, i]": (lambda x, m: x[m, [0, 1, 2, 2, 4]], rows),
    "x[rows, :, i]": (lambda x, m: x[m, :, 1], rows),
    "repeats": (lambda x, m: (x.repeat_interleave(m, 0), torch.repeat_interleave(m)), repeats),
    "repeats of all": (lambda x, m: x[:, 0, 0].repeat_interleave(m, output_size=9), repeats),
    "repeats of one": (lambda x, m: (x.repeat_interleave(2), x.repeat_interleave(m[:1], 1)),
        repeats),
}  # fmt: skip
PUT = {
    "x[rows] = v": (rows, lambda x, m, v: write(x, m, v)),
    "x[rows] = one": (rows, lambda x, m, v: write(x, m, v[0])),
    "x[rows] = number": (rows, lambda x, m, v: write(x, m, 3.0)),
    "x[pairs] = one": (pairs, lambda x, m, v: write(x, m, v[0, :1])),
    "x[pairs] = v": (pairs, lambda x, m, v: write(x, m, x.detach().sin()[m] * v[:1, 0])),
    "x[all] = v": (whole, lambda x, m, v: write(x, m, x.detach().cos()[m])),
    "x[:, columns] = v": (rows, lambda x, m, v: write(x, (slice(None), m[:5]), v[:1, :3])),
    "x[:, columns] = all": (rows, lambda x, m, v: write(
        x, (slice(1, 6), m[:5]), v[:, :3] * v[0, 0, 0])),
    "masked_scatter": (whole, lambda x, m, v: x.masked_scatter(m, v)),
    "masked_scatter_": (whole, lambda x, m, v: (x * 1).masked_scatter_(m[:, :1], v)),
    "masked_fill_": (whole, lambda x, m, v: (x * 1).masked_fill_(m, v[0, 0, 0])),
}  # fmt: skip
PLACES = {
    "nonzero": lambda m: (m.nonzero(), torch.argwhere(m), m.nonzero(as_tuple=True)),
    "where": lambda m: torch.where(m),
    "static": lambda m: [torch.nonzero_static(m, size=n, fill_value=-7) for n in (0, 3, 200)],
    "count": lambda m: torch.count_nonzero(m),
    "one row": lambda m: m[:1].nonzero(),
    "column": lambda m: m.mT.nonzero(),
}


def write(x, index, value):
    y = x * 1
    y[index] = value
    return y


def on(size, ndim, n):
    cut = [size - size // 3, *[0] * (n - 2), size // 3]
    return [None, T.shard(0, cut), *([T.shard(1)] if ndim > 1 else [])]


@pytest.mark.parametrize("name", SELECT)
def test_select(name):
    fn, mask = SELECT[name]
    for n in (2, 3):
        for place in itertools.product(on(N, 3, n), on(N, mask.ndim, n)):
            if any(place):
                T.hold(fn, [x, mask], place, (n,))


@pytest.mark.parametrize("name", PUT)
def test_put(name):
    mask, fn = PUT[name]
    for place in itertools.product(on(N, 3, 3)[1:], on(N, mask.ndim, 3), on(len(v), 3, 3)[:2]):
        T.hold(fn, [x, mask, v], place, (3,))


@pytest.mark.parametrize("name", PLACES)
def test_places(name):
    for cut in T.cuts(N):
        T.hold(PLACES[name], [whole], [T.shard(0, cut)], (len(cut),))
    for dim in (1, 2):
        T.hold(PLACES[name], [whole], [T.shard(dim)], (3,))


@pytest.mark.parametrize("name", [*SELECT, *PUT, *PLACES])
def test_meshes(name):
    places = [
        ([Shard(0), Shard(1)], [Shard(0), Replicate()]), ([Shard(0), Shard(0)], [Shard(0)] * 2),
        ([Replicate(), Shard(2)], [Shard(0), Replicate()]), ([Shard(1), Shard(0)], [Replicate()] * 2),
    ]  # fmt: skip
    for a, b in places:
        if name in PLACES:
            T.hold(PLACES[name], [whole], [T.On(a)], (2, 2))
        elif name in SELECT:
            T.hold(SELECT[name][0], [x, SELECT[name][1]], [T.On(a), T.On(b)], (2, 2))
        else:
            mask, fn = PUT[name]
            T.hold(fn, [x, mask, v], [T.On(a), T.On(b), None], (2, 2))


@pytest.mark.parametrize("cut", T.cuts(N))
def test_cuts(cut):
    place = T.shard(0, cut)
    for name in ("x[rows]", "x[pairs]", "masked_select", "repeats"):
        fn, mask = SELECT[name]
        T.hold(fn, [x, mask], [place, place], (len(cut),))
    for name in ("x[rows] = v", "masked_scatter"):
        mask, fn = PUT[name]
        T.hold(fn, [x, mask, v], [place, place, None], (len(cut),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes(dtype):
    a = (3 * x).to(dtype)
    T.hold(
        lambda a, m: (
            a[m],
            a.masked_select(m[:, None, None]),
            a.nonzero(),
            a.repeat_interleave(repeats, 0),
            a.masked_scatter(m[:, None, None], a),
        ),
        [a, rows],
        [T.shard(0)] * 2,
        (2,),
    )


def test_results_stay_sharded():
    for fn, mask in (SELECT["x[rows]"], SELECT["repeats"]):
        (spec, *_) = T.hold(fn, [x, mask], [T.shard(0), T.shard(0)], (2,))
        assert spec.varying == (0,)
    (spec,) = T.hold(lambda m: m.nonzero(), [whole], [T.shard(0)], (2,))
    assert spec.sizes[0] == (int(whole[:4].sum()), int(whole[4:].sum()))


def small():
    mesh = T.make_mesh((2,))
    s = st.distribute_tensor(torch.tensor([1.0, 0.0]), mesh, [Shard(0)])
    assert s.sum().nonzero().shape == (1, 0) and len(torch.where(s.sum())) == 1
    assert s.sum().masked_select(torch.tensor(True)).shape == (1,)
    with pytest.raises(IndexError):
        s[torch.tensor([True])]
    with pytest.raises(RuntimeError):
        s.masked_scatter(torch.ones(2, dtype=torch.bool), torch.ones(1))
    with pytest.raises(RuntimeError):
        s[torch.tensor([True, False])] = torch.ones(2)
    with st.trace() as t:
        s[s > 0]
    assert [c.collective for c in t.sent] == ["all_gather"] and t.bytes == 8


def test_small():
    st.simulate(2, small)

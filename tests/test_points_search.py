"""Neighbours in sharded clouds against all distances, sorted."""

import itertools

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ops.points.pairs import pack, unpack

torch.manual_seed(0)
D = torch.float64
q, p = torch.randn(9, 3, dtype=D), torch.randn(13, 3, dtype=D)
grid = torch.cartesian_prod(*[torch.arange(4, dtype=D)] * 2)[torch.randperm(16)]
MESH = [
    (T.On([Shard(0), Shard(0)], {0: (5, 0, 1, 3)}), T.On([Shard(0), Shard(0)], {0: (0, 9, 3, 1)})),
    (T.On([Shard(0), Replicate()]), T.On([Replicate(), Shard(0)], {0: (4, 9)})),
    (T.On([Replicate(), Shard(0)]), T.On([Shard(0), Shard(0)])),
    (T.On([Shard(0), Shard(1)]), T.On([Shard(1), Shard(0)])),
    (None, T.On([Shard(0), Shard(0)], {0: (1, 0, 0, 12)})),
    (T.On([Shard(0), Shard(0)]), None),
    (T.On([Replicate(), Replicate()]), T.On([Replicate(), Shard(0)])),
]


def root(d2):
    return torch.where(d2 > 0, torch.where(d2 > 0, d2, 1).sqrt(), 0)


def all_pairs(q, p):
    return ((q[:, None] - p) ** 2).sum(-1)


def serial_knn(q, p, k):
    d2, index = all_pairs(q, p).sort(dim=1, stable=True)
    return root(d2[:, :k]), index[:, :k]


def serial_within(q, p, r, most, first):
    d2 = all_pairs(q, p)
    key = torch.arange(len(p), dtype=d2.dtype).expand_as(d2) if first else d2.detach()
    key = key.masked_fill(d2 > r * r, torch.inf)
    order = key.argsort(dim=1, stable=True)[:, :most]
    none = key.gather(1, order) == torch.inf
    d = root(d2.gather(1, order)).masked_fill(none, torch.inf)
    d, order = d, order.masked_fill(none, -1)
    lacking = most - order.shape[1]
    if lacking > 0:
        d = torch.cat([d, d.new_full((len(q), lacking), torch.inf)], 1)
        order = torch.cat([order, order.new_full((len(q), lacking), -1)], 1)
    return d, order, (d2 <= r * r).sum(1)


def either(ours, serial, *rest):
    """ours on sharded arguments, serial on plain ones."""

    def fn(q, p):
        sharded = any(isinstance(x, st.ShardTensor) for x in (q, p))
        return ours(q, p) if sharded else serial(q, p, *rest)

    return fn


def knn(k, chunk=3):
    return either(lambda q, p: st.points.knn(q, p, k, chunk=chunk), serial_knn, k)


def within(r, most, first, chunk=3):
    op = st.points.ball_query if first else st.points.radius
    return either(lambda q, p: op(q, p, r, most, chunk=chunk), serial_within, r, most, first)


CASES = {"knn": knn(5), "radius": within(1.4, 4, False), "ball": within(1.4, 4, True)}


@pytest.mark.parametrize("name", CASES)
def test_cuts(name):
    """Queries sharded, points sharded, both: by any sizes on 1 to 4 ranks."""
    for a, b in itertools.product(T.cuts(9), T.cuts(13)):
        if len(a) == len(b):
            specs = T.hold(CASES[name], [q, p], [T.shard(0, a), T.shard(0, b)], (len(a),))
            assert specs[1].dims[0].sizes == a
    for cut in T.cuts(13):
        T.hold(CASES[name], [q, p], [None, T.shard(0, cut)], (len(cut),))
        T.hold(CASES[name], [q[:2], p], [T.shard(0), T.shard(0, cut)], (len(cut),))
    for cut in T.cuts(9):
        T.hold(CASES[name], [q, p], [T.shard(0, cut), None], (len(cut),))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("places", MESH)
def test_mesh(name, places):
    T.hold(CASES[name], [q, p], places, (2, 2))


@pytest.mark.parametrize("k", [1, 3, 6, 16])
def test_ties(k):
    """On a grid most neighbours are as far as others: the first come first, in any sharding."""
    for chunk in (2, 5, 100):
        d, index = st.points.knn(grid, grid, k, chunk=chunk)
        want = serial_knn(grid, grid, k)
        assert torch.equal(index, want[1]) and torch.equal(d, want[0])
        for cut in T.cuts(16):
            T.hold(knn(k, chunk), [grid, grid], [T.shard(0, cut)] * 2, (len(cut),))
    T.hold(
        knn(k, 2), [grid, grid.flip(0)], [T.On([Shard(0), Shard(0)], {0: (3, 0, 9, 4)})] * 2, (2, 2)
    )


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("most", [2, 5, 20])
def test_within_ties_and_padding(most, first):
    for r in (0, 1, 2, 30):
        want = serial_within(grid, grid, r, most, first)
        op = st.points.ball_query if first else st.points.radius
        for got, w in zip(op(grid, grid, r, most, chunk=3), want, strict=True):
            assert torch.equal(got, w)
        for cut in T.cuts(16):
            T.hold(within(r, most, first), [grid, grid], [T.shard(0, cut)] * 2, (len(cut),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, D])
@pytest.mark.parametrize("n", [1, 2, 70])
def test_dims_and_dtypes(n, dtype):
    a, b = torch.randn(6, n).to(dtype), torch.randn(11, n).to(dtype)
    d, index = st.points.knn(a, b, 4, chunk=2)
    want = serial_knn(a.double(), b.double(), 4)
    assert d.dtype is dtype and torch.equal(index, want[1])
    assert torch.allclose(
        d.double(), want[0], rtol={D: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-3)
    )
    T.hold(
        lambda a, b: st.points.knn(a, b, 4),
        [a, b],
        [T.shard(0), T.shard(0, (9, 0, 2))],
        (3,),
        rtol=1e-3,
    )


def test_no_queries_and_no_points():
    for cut in ((0, 0), (0,)):
        T.hold(knn(2), [q[:0], p], [T.shard(0, cut), T.shard(0)], (len(cut),))
        T.hold(CASES["radius"], [q, p[:0]], [T.shard(0), T.shard(0, cut)], (len(cut),))


def test_second_derivative():
    def fn(q, p):
        d, _ = knn(3)(q, p)
        (g,) = torch.autograd.grad((d**3).sum(), p, create_graph=True)
        return g

    T.hold(fn, [q, p], [T.shard(0), T.shard(0, (2, 11))], (2,))


def test_mistakes():
    for bad in (
        lambda: st.points.knn(q, p, 14), lambda: st.points.knn(q, p, 0),
        lambda: st.points.knn(q[:, :2], p, 1), lambda: st.points.knn(q.float(), p, 1),
        lambda: st.points.radius(q, p, -1.0, 3), lambda: st.points.ball_query(q, p, 1.0, 0),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(st.RankError, match="14 neighbours of 13"):
        T.hold(lambda q, p: st.points.knn(q, p, 14 if isinstance(q, st.ShardTensor) else 1),
               [q, p], [T.shard(0)] * 2, (2,))  # fmt: skip


def all_three(q, p):
    return [case(q, p) for case in CASES.values()]


@pytest.mark.gloo
def test_worker_processes():
    """Rounds of messages of any size, also none, over gloo."""
    places = [T.shard(0, (3, 0, 6)), T.shard(0, (1, 12, 0))]
    T.hold(all_three, [q, p], places, (3,), run=T.run_workers)


def test_is_not_compiled():
    def on_rank():
        x = st.distribute_tensor(p, T.make_mesh((2,)), [Shard(0)], src_data_rank=None)
        with pytest.raises(st.UnsupportedOpError, match="compiled"):
            st.compile(lambda x: st.points.knn(x, x, 2)[0], fullgraph=True)(x)

    st.simulate(2, on_rank)


def line(gap):
    """Two ranks with 64 points each on a line, the second `gap` after the first; what knn sends."""
    x = torch.arange(128, dtype=D)[:, None]
    x[64:] += gap
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    with st.trace() as t, torch.no_grad():
        st.points.knn(x, x, 3, chunk=8)
    return t.bytes, [s.collective for s in t.sent]


def test_only_what_is_in_reach_is_sent():
    # both ends of 8 boxes, and which of 2 rounds are needed
    setup = 2 * 8 * 8 + 2 * 4
    found = st.simulate(2, line, 0.0)
    # which of 8 chunks: 8 booleans; then one chunk of 8 rows of a coordinate and an index
    assert [f[0] for f in found] == [setup + 8 + 8 * 16] * 2
    assert found[0][1] == ["all_gather"] * 2 + ["all_reduce"] + ["points"] * 2
    assert [f[0] for f in st.simulate(2, line, 9.0)] == [setup] * 2


def gradients():
    """Backward sends one row for each neighbour that is not a rank's own."""
    x = torch.arange(128, dtype=D)[:, None]
    x = st.distribute_tensor(x, T.make_mesh((2,)), [Shard(0)], src_data_rank=None).requires_grad_()
    with st.trace() as t:
        d, _ = st.points.knn(x, x, 5, chunk=8)
    with st.trace() as back:
        d.sum().backward()
    return [sum(s.bytes for s in x.sent if s.collective in ("take", "put")) for x in (t, back)]


def test_neighbours_travel_once():
    # the 2 rows beside the border: how many, their numbers, and the rows themselves; then those
    take = 8 + 2 * 8 + 2 * 8
    assert st.simulate(2, gradients) == [[take, 2 * 8]] * 2


def test_more_points_on_a_rank_than_32_bits_count():
    """A row and its index travel as integers of the row's width."""
    x, index = torch.rand(2, 3), torch.tensor([5, 2**31 - 2])
    rows, found = unpack(pack(x, index, (2**31 - 1, 3)), torch.float32)
    assert torch.equal(rows, x) and torch.equal(found, index)
    with pytest.raises(st.UnsupportedOpError, match=r"2147483648 points of .* on one rank"):
        pack(x, index, (3, 2**31))
    rows, found = unpack(pack(x.double(), index + 2**40, (2**50,)), torch.float64)
    assert torch.equal(found, index + 2**40)

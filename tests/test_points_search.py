"""Neighbours, samples and interpolation of sharded points against serial definitions."""

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.points import nearest
from shardtensor.points.search import knn

torch.manual_seed(0)
D = torch.float64
Q, P = torch.rand(11, 3, dtype=D), torch.rand(23, 3, dtype=D)
# many equal distances
GRID = torch.cartesian_prod(*[torch.arange(3.0, dtype=D)] * 3)


def serial(q, p, k, r=None, by_index=False):
    """By a full sort of all pairs, from the definition."""
    d2 = sum((q[:, None, i] - p[None, :, i]) ** 2 for i in range(q.shape[1]))
    rows = []
    for row in d2.tolist():
        inside = [(d, j) for j, d in enumerate(row) if r is None or d <= r * r]
        inside.sort(key=(lambda e: e[1]) if by_index else None)
        some = inside[:k] + [(float("inf"), -1)] * (k - len(inside))
        rows.append(([d**0.5 for d, _ in some], [j for _, j in some], len(inside)))
    distances, index, counts = zip(*rows, strict=True)
    return torch.tensor(distances, dtype=q.dtype), torch.tensor(index), torch.tensor(counts)


def reference(q, p, k, r=None, by_index=False):
    """The serial search with gradients through the distances found."""
    _, index, counts = serial(q.detach(), p.detach(), k, r, by_index)
    away = q[:, None] - p[index.clamp(min=0)]
    d = torch.linalg.vector_norm(away, dim=-1)
    return torch.where(index < 0, torch.inf, d), index, counts


def either(ours, plain):
    """Ours on shards, the definition on plain tensors; what is not there without an infinity."""

    def fn(*xs):
        run = ours if any(isinstance(x, st.ShardTensor) for x in xs) else plain
        d, *rest = run(*xs)
        return d.masked_fill(d == torch.inf, -1), *rest

    return fn


def layouts(mq, mp):
    """Places of queries and points, and a mesh."""
    for cut in T.cuts(mp):
        n = len(cut)
        rest = mq - mq // n * (n - 1)
        own = T.shard(0, (*[mq // n] * (n - 1), rest))
        yield [None, T.shard(0, cut)], (n,)
        yield [own, T.shard(0, cut)], (n,)
    yield [T.shard(0, (mq - 2, 2)), None], (2,)
    yield [T.On([Shard(0), Replicate()]), T.On([Replicate(), Shard(0)])], (2, 2)
    yield [T.On([Shard(0), Shard(0)]), T.On([Shard(0), Shard(0)], {0: (3, 0, mp - 5, 2)})], (2, 2)
    yield [T.On([Shard(0), Replicate()]), T.On([Shard(0), Shard(0)])], (2, 2)
    yield [T.On([Shard(0), Shard(0)]), T.On([Shard(0), Replicate()])], (2, 2)


@pytest.mark.parametrize("k", [1, 5, 23])
def test_knn(k):
    fn = either(lambda q, p: st.points.knn(q, p, k), lambda q, p: reference(q, p, k)[:2])
    for places, mesh in layouts(len(Q), len(P)):
        T.hold(fn, [Q, P], places, mesh)


@pytest.mark.parametrize("k", [4, 9])
def test_knn_of_equal_distances(k):
    fn = either(lambda q, p: st.points.knn(q, p, k), lambda q, p: reference(q, p, k)[:2])
    for places, mesh in layouts(27, 27):
        T.hold(fn, [GRID, GRID], places, mesh)


@pytest.mark.parametrize("r", [0.0, 0.4, 5.0])
@pytest.mark.parametrize("by_index", [False, True])
def test_radius_and_ball_query(r, by_index):
    ours = st.points.ball_query if by_index else st.points.radius
    fn = either(lambda q, p: ours(q, p, r, 4), lambda q, p: reference(q, p, 4, r, by_index))
    for places, mesh in layouts(len(Q), len(P)):
        T.hold(fn, [Q, P], places, mesh)


def test_small_chunks_and_plain(monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK", 16)
    fn = either(lambda q, p: st.points.knn(q, p, 3), lambda q, p: reference(q, p, 3)[:2])
    T.hold(fn, [GRID, GRID], [T.shard(0), T.shard(0)], (2,))
    d, index = st.points.knn(Q, P, 3)
    want = serial(Q, P, 3)
    assert torch.equal(index, want[1]) and torch.allclose(d, want[0], rtol=1e-14)


def test_one_dim_and_single_precision():
    fn = either(lambda q, p: st.points.knn(q, p, 3), lambda q, p: reference(q, p, 3)[:2])
    for dtype in (D, torch.float32):
        q, p = torch.rand(9, 1, dtype=dtype), torch.rand(12, 1, dtype=dtype)
        T.hold(fn, [q, p], [T.shard(0), T.shard(0)], (3,))


def slabs(k, r, n=4):
    """Points in n slabs far from each other, but for one point near the next slab."""
    g = torch.Generator().manual_seed(1)
    x = torch.rand(40 * n, 3, generator=g)
    x[:, 0] += 100 * (torch.arange(40 * n) // 40)
    x[39, 0] = 99.9
    s = st.distribute_tensor(x, T.make_mesh((n,)), [Shard(0)], src_data_rank=None)
    with st.trace() as t:
        if k:
            st.points.knn(s, s, k)
        else:
            st.points.radius(s, s, r, 3)
    return sum(s.bytes for s in t.sent if s.collective == "points"), [
        s.collective for s in t.sent if s.collective != "points"
    ]


def test_only_what_is_in_reach_travels():
    row = 3 * 4 + 8
    radius = st.simulate(4, slabs, 0, 0.05)
    assert [b for b, _ in radius] == [0, 0, 0, 0]
    near = st.simulate(4, slabs, 0, 0.5)
    # the point at the border, and those of the next slab that are in its reach
    assert near[0][0] == row and 0 < near[1][0] <= 40 * row and near[2][0] == near[3][0] == 0
    assert all(names == ["all_gather", "all_gather"] for _, names in near)
    assert all(b < 3 * 40 * row for b, _ in st.simulate(4, slabs, 3, None))


def test_refusals():
    for args, message in (
        ((Q, P, 0), "k is 0"), ((Q, P, 24), "k is 24"), ((Q, P[:, :2], 1), "queries"),
        ((Q, P.float(), 1), "float"), ((Q[0], P, 1), "queries"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            knn(*args)
    with pytest.raises(ValueError, match="max_neighbors"):
        st.points.radius(Q, P, 1.0, 0)
    with pytest.raises(ValueError, match="r is"):
        st.points.radius(Q, P, -1.0, 2)


def farthest(p, m, start):
    """From the definition."""
    chosen, near = [start], [float("inf")] * len(p)
    for _ in range(m - 1):
        d2 = sum((p[:, i] - p[chosen[-1], i]) ** 2 for i in range(p.shape[1])).tolist()
        near = [min(a, b) for a, b in zip(near, d2, strict=True)]
        chosen.append(max(range(len(near)), key=lambda j: (near[j], -j)))
    return torch.tensor(chosen)


@pytest.mark.parametrize("points", [P, GRID], ids=["random", "ties"])
@pytest.mark.parametrize("start", [0, 22])
def test_farthest_point_sampling(points, start):
    want = farthest(points, 9, start)
    assert torch.equal(st.points.farthest_point_sampling(points, 9, start), want)

    def run(cut, mesh):
        sizes = {0: cut}
        axes = [Shard(0)] * len(mesh)
        s = st.distribute_tensor(points, T.make_mesh(mesh), axes, src_data_rank=None, sizes=sizes)
        with st.trace() as t:
            found = st.points.farthest_point_sampling(s, 9, start)
        return T.full(found), t.sent

    cases = [(c, (len(c),)) for c in T.cuts(len(points))]
    for cut, mesh in [*cases, ((5, 0, len(points) - 7, 2), (2, 2))]:
        for found, sent in st.simulate(len(cut), run, cut, mesh):
            assert torch.equal(found, want)
            assert all(s.bytes == 8 * 5 * (len(cut) - 1) for s in sent)
            assert len(sent) == (9 if len(cut) > 1 else 0)


def test_interpolate():
    def weighted(q, p, f, k=3):
        d, index, _ = reference(q, p, k)
        w = 1 / (d**2 + 1e-8)
        return (((w / w.sum(1, keepdim=True))[..., None] * f[index]).sum(1),)

    fn = either(lambda *xs: (st.points.interpolate(*xs),), weighted)
    f = torch.randn(23, 2, dtype=D)
    for cut in T.cuts(23):
        for own in (None, T.shard(0)):
            T.hold(fn, [Q, P, f], [own, T.shard(0, cut), T.shard(0, cut)], (len(cut),), rtol=1e-10)
    T.hold(fn, [Q, P, f], [T.shard(0), None, None], (2,), rtol=1e-10)
    with pytest.raises(ValueError, match="features"):
        st.points.interpolate(Q, P, f[:3])

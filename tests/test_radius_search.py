"""physicsnemo's search by radius on sharded clouds, by a kernel that visits points as Warp's does."""

import random

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ops import physicsnemo
from shardtensor.ops.points.pairs import meet
from shardtensor.ops.points.reach import near
from shardtensor.ranks.testing import make_mesh


def visited(points, queries, radius):
    """Whether and when each query (M,) meets each point (N,): by cells, in them by index."""
    d2 = (queries[:, None] - points).square().sum(-1)
    cells = (points / (0.5 * radius or 1)).nan_to_num().floor()
    order = torch.arange(len(points))
    for c in range(3):
        order = order[cells[order, c].argsort(stable=True)]
    when = torch.empty_like(order)
    when[order] = torch.arange(len(points))
    inside = d2 <= radius * radius
    return torch.where(inside, when, len(points)).sort(1), inside.sum(1)


@torch.library.custom_op("physicsnemo::radius_search_warp", mutates_args=())
def search(
    points: Tensor, queries: Tensor, radius: float, max_points: int | None = None,
    return_dists: bool = False, return_points: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op's results, in its dtypes and shapes, of one cloud or a batch of them."""
    if not points.numel() or not queries.numel():
        raise RuntimeError("the stand-in takes no empty clouds, as the kernel's backward does")
    alone = points.ndim == 2
    rows, dists, places, counts = [], [], [], []
    for b, (p, q) in enumerate(
        zip(*((x[None] if alone else x) for x in (points, queries)), strict=True)
    ):
        (_, order), n = visited(p, q, radius)
        if max_points is not None:
            order = torch.nn.functional.pad(order, (0, max_points))[:, :max_points]
        used = torch.arange(order.shape[1]) < n[:, None]
        index, at = torch.where(used, order, 0), q[:, None] - p[order.clamp(max=len(p) - 1)]
        d = torch.where(used, at.norm(dim=-1), 0)
        xyz = torch.where(used[..., None], p[index], 0)
        counts.append(n if max_points is None else n.clamp(max=max_points))
        if max_points is None:
            who = used.nonzero()[:, 0]
            index = torch.stack([torch.full_like(who, b), who, index[used]])
            d, xyz = d[used], xyz[used]
        rows.append(index.int())
        dists.append(d)
        places.append(xyz)
    if max_points is None:
        index, d, xyz = torch.cat(rows, 1)[int(alone) :], torch.cat(dists), torch.cat(places)
        n = torch.empty(0, dtype=torch.int32)
    else:
        index, d, xyz, n = (torch.stack(xs) for xs in (rows, dists, places, counts))
        n = n.int()
        if alone:
            index, d, xyz, n = index[0], d[0], xyz[0], n[0]
    d = d if return_dists else d.new_empty(0)
    xyz = xyz if return_points else xyz.new_empty((0, max_points or 0, 3)[max_points is None :])
    return index.clone(), xyz.clone(), d.clone(), n.clone()


def keep(ctx, inputs, output):
    ctx.shape, ctx.most, ctx.wanted = inputs[0].shape, inputs[3], inputs[5]
    ctx.save_for_backward(output[0], output[3])


def back(ctx, _, g, *rest):
    if not ctx.wanted:
        return (None,) * 6
    index, n = ctx.saved_tensors
    out = g.new_zeros(ctx.shape)
    if ctx.most is None:
        out.index_put_(at_rows(index), g, True)
    else:
        used = torch.arange(ctx.most) < n[..., None]
        lead = used.nonzero()[:, :-2].unbind(1)
        out.index_put_((*lead, index[used].long()), g[used], True)
    return out, *(None,) * 5


def at_rows(index):
    """Sample, if any, and point of each pair."""
    return (*(i.long() for i in index[:-2]), index[-1].long())


search.register_autograd(back, setup_context=keep)
st.rule(search)(physicsnemo.radius_search)


def clouds(batch, n, m, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (batch,) if batch else ()
    return torch.randn(*shape, n, 3, generator=g), torch.randn(*shape, m, 3, generator=g)


def both(most, dists=True, points=True, r=0.8):
    return lambda p, q: search(p, q, r, most, dists, points)


CASES = [(0, 5), (0, None), (1, 4), (2, 4), (2, None)]


@pytest.mark.parametrize("batch, most", CASES)
def test_what_one_device_finds_and_in_its_order(batch, most):
    p, q = clouds(batch, 30, 13)
    d = int(batch > 0)
    for a, b in [((30,), (13,)), ((11, 19), (5, 8)), ((0, 30), (13, 0)), ((9, 0, 21), (1, 12, 0))]:
        for places in (
            [T.shard(d, a), T.shard(d, b)], [T.shard(d, a), None], [None, T.shard(d, b)]
        ):  # fmt: skip
            T.hold(both(most), [p, q], places, (len(a),))


@pytest.mark.parametrize("most", [3, None])
def test_samples_and_coordinates_may_be_cut(most):
    p, q = clouds(3, 20, 9, seed=1)
    for places in [(0, 0), (0, 1), (1, 0), (2, 1), (1, 2), (0, 2)]:
        T.hold(both(most), [p, q], [T.shard(d) for d in places], (2,))
    two = [T.On([Shard(1), Shard(1)]), T.On([Shard(0), Shard(1)])]
    T.hold(both(most), [p, q], two, (2, 2))


@pytest.mark.parametrize("dists, points", [(False, False), (True, False), (False, True)])
def test_what_is_not_asked_for_is_empty(dists, points):
    p, q = clouds(1, 20, 9, seed=2)
    for most in (4, None):
        T.hold(both(most, dists, points), [p, q], [T.shard(1), T.shard(1)], (2,))
        T.hold(both(most, dists, points), [p, q], [None, T.shard(1)], (2,))


def test_only_points_within_reach_travel():
    """Two clouds in a line, each rank's part beside the other's: a rank fetches what is near."""
    p, _ = torch.rand(4000, 3, generator=torch.Generator().manual_seed(3)).sort(0)
    p = p * torch.tensor([10.0, 1.0, 1.0])

    def rank():
        x = st.distribute_tensor(p, make_mesh((4,)), [Shard(0)], src_data_rank=None)
        with st.trace() as t:
            found = near(meet(x, x), 0.2)
        mine = x._spec.spans[0]
        return len(found.at), mine, found.at, max(s.bytes for s in t.sent)

    for count, (a, b), index, sent in st.simulate(4, rank):
        assert (index.diff() > 0).all()
        within = torch.cdist(p, p[a:b]).amin(1) <= 0.2
        assert within[index].sum() == within.sum() and count < 1.5 * (b - a)
        assert sent < p.numel() * 4 / 4


def test_nothing_is_gathered():
    p, q = clouds(1, 40, 12, seed=5)

    def rank():
        mesh = make_mesh((2,))
        x, y = (st.distribute_tensor(t, mesh, [Shard(1)], src_data_rank=None) for t in (p, q))
        with st.fallback("error"):
            return [search(x, y, 0.5, most, False, True)[0].full_tensor() for most in (4, None)]

    want = [search(p, q, 0.5, most, False, True)[0] for most in (4, None)]
    for got in st.simulate(2, rank):
        assert all(map(torch.equal, got, want))


@search.register_fake
def faked(points, queries, radius, max_points=None, return_dists=False, return_points=False):
    lead = queries.shape[:-1]
    index = points.new_empty((*lead, max_points), dtype=torch.int32)
    xyz = points.new_empty((*lead, max_points, 3))
    return index, xyz, points.new_empty(index.shape), index.new_empty(lead)


@pytest.mark.filterwarnings("ignore::shardtensor.FallbackWarning")
def test_programs_and_rehearsals():
    """A graph holds the op on all points; a rank that rehearses finds what lies in its own."""
    p, q = clouds(1, 40, 12, seed=6)

    def call(x, y):
        return search(x, y, 0.5, 4, True, True)[1] * 2

    def rank():
        mesh = make_mesh((2,))
        x, y = (st.distribute_tensor(t, mesh, [Shard(1)], src_data_rank=None) for t in (p, q))
        program = st.compile(call, backend="eager", fullgraph=True)
        return program(x, y).full_tensor()

    for got in st.simulate(2, rank):
        assert torch.equal(got, call(p, q))

    def prepare():
        x = st.ShardTensor.from_local(p[:, :20], make_mesh((2,)), [Shard(1)], sizes={1: (20, 20)})
        return lambda: call(x, x)

    assert not sum(s.bytes for s in st.rehearse(prepare, ranks=2, repeats=1).sent)


def test_nan_and_inf_hide_no_neighbour():
    p, q = clouds(0, 300, 40, seed=4)
    p[5, 0], p[100, 1], p[250] = torch.nan, torch.inf, torch.nan
    rng = random.Random(0)
    for _ in range(3):
        a, b = sorted(rng.sample(range(301), 2))
        T.hold(both(6, points=False), [p, q], [T.shard(0, (a, b - a, 300 - b)), T.shard(0)], (3,))


@pytest.mark.parametrize("bad", ["ranks", "samples", "coordinates"])
def test_mistakes_are_raised_on_all_ranks(bad):
    p, q = clouds(2, 6, 5)
    given = {"ranks": (p[0], q), "samples": (p, q[:1]), "coordinates": (p[..., :2], q[..., :2])}

    def rank():
        mesh = make_mesh((2,))
        x, y = (st.distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for t in given[bad])
        with pytest.raises(ValueError):
            search(x, y, 0.5, 3)

    st.simulate(2, rank)

"""Shards that are uneven on purpose: the best sizes, and sizes that follow measured times."""

import copy
import random
from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import balance, checkpoint
from shardtensor.ranks.testing import make_mesh, simulate

F64 = torch.float64


def least(size, ranks, weights, speeds, multiple, most):
    """The least time of the slowest rank, by trying all cuts; None where none is allowed."""
    edges = [e for e in range(size + 1) if e % multiple == 0 or e == size]
    found = []
    for inner in combinations_with_replacement(edges, ranks - 1):
        sizes = [b - a for a, b in pairwise([0, *inner, size])]
        if most is None or all(n <= m for n, m in zip(sizes, most, strict=True)):
            found.append(max(balance.loads(sizes, weights=weights, speeds=speeds)))
    return min((t for t in found if t < float("inf")), default=None)


@pytest.mark.parametrize("seed", range(4))
def test_the_slowest_rank_has_as_little_as_any_cut_gives_it(seed):
    rng = random.Random(seed)
    refused = 0
    for _ in range(150):
        size, ranks, multiple = rng.randint(0, 8), rng.randint(1, 4), rng.choice([1, 1, 2, 3])
        weights = rng.choice([
            None, [rng.choice([0, 0, 1, 5, 50]) for _ in range(size)],
            [rng.random() for _ in range(size)],
        ])  # fmt: skip
        speeds = rng.choice([None, [rng.choice([1, 2, 0.5, 0.1, 0, 3]) for _ in range(ranks)]])
        speeds = speeds if speeds is None or any(speeds) else None
        most = rng.choice([None, None, [rng.randint(0, size + 2) for _ in range(ranks)]])
        # rows none of which has weight count alike
        counted = weights if weights and any(weights) else None
        want = least(size, ranks, counted, speeds, multiple, most)
        asked = dict(weights=weights, speeds=speeds, multiple=multiple, most=most)
        if want is None:
            refused += 1
            with pytest.raises(ValueError, match="rows do not fit ranks"):
                balance.sizes(size, ranks, **asked)
            continue
        found = balance.sizes(size, ranks, **asked)
        assert len(found) == ranks and sum(found) == size and min(found) >= 0
        assert all(e % multiple == 0 or e == size for e in found.offsets)
        assert most is None or all(n <= m for n, m in zip(found, most, strict=True))
        got = max(balance.loads(found, weights=counted, speeds=speeds))
        assert got == pytest.approx(want, rel=1e-9), asked
    assert 0 < refused < 75


def test_extremes():
    assert balance.sizes(721, 3, speeds=[1, 1, 0.5]) == (288, 289, 144)
    assert balance.sizes(721, 3, speeds=[1, 1, 0.5], multiple=4) == (288, 288, 145)
    # no rows, fewer than ranks, no weight, one row heavier than all others
    assert balance.sizes(0, 3) == (0, 0, 0)
    assert sorted(balance.sizes(3, 5)) == [0, 0, 1, 1, 1]
    assert balance.sizes(8, 4, weights=torch.zeros(8)) == (2, 2, 2, 2)
    heavy = balance.sizes(8, 4, weights=[1, 1, 1, 100, 1, 1, 1, 1])
    assert max(balance.loads(heavy, weights=[1, 1, 1, 100, 1, 1, 1, 1])) == 100
    # a rank that is out, one that holds little
    assert balance.sizes(10, 3, speeds=[1, 0, 1]) == (5, 0, 5)
    assert balance.sizes(10, 2, most=[3, 9]) == (3, 7)
    # whole numbers are exact however large, thirds are no trouble
    big = np.full(9, 2**50 + 1, dtype=np.int64)
    assert balance.sizes(9, 3, weights=big) == (3, 3, 3)
    assert balance.sizes(3, 2, weights=[2**59, 1, 2**59 - 1]) == (1, 2)
    assert balance.sizes(3, 2, weights=[2**59 - 1, 1, 2**59]) == (2, 1)
    assert balance.sizes(9, 3, speeds=[1 / 3] * 3) == (3, 3, 3)
    assert balance.sizes(10**9, 4, speeds=[1, 1, 1, 5])[-1] == 625_000_000
    # a mask of land: as many points for each
    mask = torch.zeros(20, 10, dtype=torch.bool)
    mask[12:] = True
    assert balance.sizes(20, 4, weights=mask.sum(1)) == (14, 2, 2, 2)


def test_mistakes():
    with pytest.raises(ValueError, match=r"speeds .* of 2 ranks"):
        balance.sizes(4, 2, speeds=[1, 1, 1])
    with pytest.raises(ValueError, match="not all of them 0"):
        balance.sizes(4, 2, speeds=[0, 0])
    with pytest.raises(ValueError, match="speeds"):
        balance.sizes(4, 2, speeds=[1, float("nan")])
    for weights in ([1, 2, 3], [1, 2, 3, -1], [1, 2, 3, float("inf")]):
        with pytest.raises(ValueError, match="weights"):
            balance.sizes(4, 2, weights=weights)
    with pytest.raises(ValueError, match="4 rows for 0 ranks"):
        balance.sizes(4, 0)
    with pytest.raises(ValueError, match="most"):
        balance.sizes(4, 2, most=[4])

    def on_rank():
        mesh = make_mesh((2,))
        with pytest.raises(ValueError, match="fewer than all"):
            balance.Balancer(8, mesh, steps=10, every=10)
        with pytest.raises(ValueError, match="of a dim of 8 rows"):
            balance.Balancer(8, mesh).load_state_dict({"sizes": [3, 4], "speeds": [1, 1]})

    simulate(2, on_rank)


class Net(nn.Module):
    """With a sharded buffer and a sharded weight, along the rows."""

    def __init__(self, rows=23):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.register_buffer("mask", torch.rand(rows, 1))
        self.embedding = nn.Parameter(torch.randn(2, rows, 6))
        self.last = nn.Conv2d(2, 1, 5, padding=2)

    def forward(self, x):
        h = F.gelu(self.norm(self.conv(x))) * self.mask + self.embedding
        return self.last(h)


def trained(model, data, steps, move=None, optimizer=None):
    """Losses; `move` gives the batches of a step and what it does at its end."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for k in range(steps):
        x, y = data[k]
        if move is not None:
            x, y = move.batch(x, y)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if move is not None:
            move.ended(model, optimizer, k)
    return losses


def rows_of(spec):
    return next(d.sizes for d in spec.dims if d.size == 23)


class Moving:
    """A rank of a fake clock: a row costs a second over the rank's speed."""

    def __init__(self, mesh, speeds, net, **given):
        self.mesh, self.true = mesh, speeds
        self.balancer = balance.Balancer(23, mesh, steps=1, every=2, **given)
        self.seen = [self.balancer.sizes]
        (self.me,) = mesh.get_coordinate()

    def batch(self, x, y):
        placed = [
            st.distribute_tensor(v, self.mesh, [Shard(2)], src_data_rank=None) for v in (x, y)
        ]
        found = self.balancer.cut({"x": placed[0], "others": [placed[1], 3]})
        assert found["others"][1] == 3 and rows_of(found["x"].spec) == self.balancer.sizes
        return found["x"], found["others"][0]

    def ended(self, model, optimizer, k):
        b = self.balancer
        if b.note(b.sizes[self.me] / self.true[self.me] + 0.5):
            embedding = model.embedding
            b.cut(model)
            assert b.cut(optimizer) is optimizer and model.embedding is embedding
            self.seen.append(b.sizes)
            assert rows_of(model.mask.spec) == rows_of(embedding.spec) == b.sizes
            (moment,) = [s["exp_avg"] for p, s in optimizer.state.items() if p is embedding]
            assert rows_of(moment.spec) == b.sizes


def sharded_net(model, mesh):
    st.shard_buffers(model, {"mask": 0}, mesh)
    whole = model.embedding.detach()
    model.embedding = nn.Parameter(
        st.distribute_tensor(whole, mesh, [Shard(1)], src_data_rank=None)
    )
    return st.parallelize(model, mesh)


def state_of(model, optimizer, balancer):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "balance": balancer.state_dict()}


def samples(steps):
    g = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(2, 1, 23, 6, dtype=F64, generator=g) for _ in range(2))
        for _ in range(steps)
    ]


SPEEDS = {1: [1.0], 2: [1.0, 0.25], 3: [1.0, 0.1, 1.0], 4: [2.0, 1.0, 0.05, 1.0]}


@pytest.mark.parametrize("ranks", SPEEDS)
def test_training_that_is_cut_anew_has_the_losses_of_one_device(ranks, tmp_path):
    """Also when it goes on from a checkpoint of another cut, and on other numbers of ranks."""
    torch.manual_seed(0)
    model, data = Net().to(F64), samples(8)
    want = trained(copy.deepcopy(model), data, 8)

    def first():
        mesh = make_mesh((ranks,))
        net = sharded_net(copy.deepcopy(model), mesh)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        moving = Moving(mesh, SPEEDS[ranks], net)
        losses = trained(net, data, 5, moving, optimizer)
        checkpoint.save(state_of(net, optimizer, moving.balancer), tmp_path, "step5")
        return losses, moving.seen

    found = simulate(ranks, first)
    losses, seen = found[0]
    assert all(f[1] == seen and f[0] == losses for f in found)
    torch.testing.assert_close(losses, want[:5], rtol=1e-9, atol=1e-12)
    assert (len(seen) > 1) == (ranks > 1)
    slow = SPEEDS[ranks].index(min(SPEEDS[ranks]))
    assert ranks == 1 or 0 <= seen[-1][slow] < 23 // ranks
    assert ranks == 1 or seen[-1] == balance.sizes(23, ranks, speeds=SPEEDS[ranks]) or ranks > 2

    def again(n):
        mesh = make_mesh((n,))
        torch.manual_seed(5)
        net = sharded_net(Net().to(F64), mesh)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        moving = Moving(mesh, [1.0] * n, net)
        loaded = checkpoint.load(state_of(net, optimizer, moving.balancer), tmp_path / "step5")
        set_state_dict(net, optimizer, model_state_dict=loaded["model"],
                       optim_state_dict=loaded["optimizer"])  # fmt: skip
        moving.balancer.load_state_dict(loaded["balance"])
        moving.balancer.cut(net), moving.balancer.cut(optimizer)
        sizes = moving.balancer.sizes
        return trained(net, data[5:], 3, moving, optimizer), sizes

    for n in {ranks, 2}:
        for losses, sizes in simulate(n, again, n):
            torch.testing.assert_close(losses, want[5:], rtol=1e-9, atol=1e-12)
            assert n != ranks or sizes == seen[-1]


def course(speeds, size=100, rounds=12, axes=(4,), noise=0.0, **given):
    """The sizes after each decision, on ranks of a fake clock."""

    def on_rank():
        mesh = make_mesh(axes)
        place = mesh.get_coordinate()
        draw = random.Random(f"{place}")
        b = balance.Balancer(size, mesh, axes=given.get("cut", (0,)), steps=3, every=5,
                             **{k: v for k, v in given.items() if k != "cut"})  # fmt: skip
        found = [tuple(b.sizes)]
        for k in range(rounds):
            for _ in range(3):
                at = place[0] if len(axes) == 1 or b.axes == (0,) else place[1]
                now = speeds(k)[tuple(place)]
                b.note((b.sizes[at] / now + 1.0) * (1 + noise * draw.random()))
            found.append(tuple(b.sizes))
        return found

    found = simulate(int(np.prod(axes)), on_rank)
    assert all(f == found[0] for f in found)
    return found[0]


def test_sizes_follow_speeds_and_then_stay():
    found = course(lambda k: {(0,): 1.0, (1,): 1.0, (2,): 0.25, (3,): 1.0})
    assert found[0] == (25, 25, 25, 25) and found[-1] == found[-2]
    times = balance.loads(found[-1], speeds=[1, 1, 0.25, 1])
    assert max(times) < 1.08 * 100 / 3.25
    # noise of a tenth moves nothing
    assert set(course(lambda k: dict.fromkeys([(0,), (1,), (2,), (3,)], 1.0), noise=0.1,
                      gain=0.15)) == {(25, 25, 25, 25)}  # fmt: skip
    # a rank that was stopped for a while comes back from nothing
    found = course(
        lambda k: {(0,): 1.0, (1,): 1.0, (2,): 1e-4 if k < 4 else 1.0, (3,): 1.0}, 20, 24
    )
    assert min(f[2] for f in found) == 0 and min(found[-1]) >= 3


def test_of_ranks_with_the_same_rows_the_slowest_counts():
    every = {(i, j): 1.0 for i in range(2) for j in range(2)}
    slow = every | {(1, 0): 0.5}
    found = course(lambda k: slow, 30, axes=(2, 2))
    assert found[-1] in ((20, 10), (19, 11), (21, 9))
    found = course(lambda k: slow, 30, axes=(2, 2), cut=(1,))
    assert found[-1] in ((10, 20), (11, 19), (9, 21))


def test_only_its_own_dims_are_cut():
    def on_rank():
        mesh = make_mesh((2, 2))
        b = balance.Balancer(8, mesh, axes=[1], speeds=[3, 1])
        assert b.sizes == (6, 2)
        whole = torch.arange(8.0 * 8 * 6).view(8, 8, 6)
        both = st.distribute_tensor(whole, mesh, [Shard(0), Shard(1)], src_data_rank=None)
        other = st.distribute_tensor(whole, mesh, [Shard(0), Replicate()], src_data_rank=None)
        narrow = st.distribute_tensor(whole, mesh, [Replicate(), Shard(2)], src_data_rank=None)
        cut, *same = b.cut((both, other, narrow, whole))
        assert cut.spec.sizes == {0: (4, 4), 1: (6, 2)} and torch.equal(cut.full_tensor(), whole)
        assert all(x is y for x, y in zip(same, (other, narrow, whole), strict=True))
        assert b.cut(cut) is cut
        # differentiably
        leaf = both.detach().requires_grad_()
        (b.cut(leaf) * whole).sum().backward()
        assert torch.equal(leaf.grad.full_tensor(), whole) and leaf.grad.spec == both.spec

    simulate(4, on_rank)


def test_gradients_move_with_their_parameter():
    def on_rank():
        mesh = make_mesh((2,))
        whole = torch.arange(8.0)
        net = nn.Module()
        net.w = nn.Parameter(st.distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
        loss = (net.w * net.w).sum()
        loss.backward()
        # the graph of the last step is there still
        balance.Balancer(8, mesh, speeds=[3, 1]).cut(net)
        assert loss.requires_grad
        assert net.w.grad.spec.sizes == net.w.spec.sizes == {0: (6, 2)}
        assert torch.equal(net.w.grad.full_tensor(), 2 * whole)
        (net.w * net.w).sum().backward()
        assert torch.equal(net.w.grad.full_tensor(), 4 * whole)
        assert torch.equal(net.w.full_tensor().detach(), whole) and net.w.is_leaf
        net.w.register_hook(lambda g: g)
        with pytest.raises(ValueError, match="hooks on a parameter"):
            balance.Balancer(8, mesh).cut(net)

    simulate(2, on_rank)


def test_a_partition_of_points_by_speed_and_work():
    def on_rank():
        g = torch.Generator().manual_seed(0)
        points, work = torch.rand(60, 3, generator=g), torch.rand(60, generator=g)
        part = st.points.partition(points, make_mesh((3,)), weights=work, speeds=[1, 2, 1])
        loads = balance.loads(part.sizes, weights=work[part.order], speeds=[1, 2, 1])
        assert torch.equal(part.restore(part.shard(points)).full_tensor(), points)
        with pytest.raises(ValueError, match="order of a curve"):
            st.points.partition(points, part.mesh, "kd", speeds=[1, 2, 1])
        return max(loads), float(work.sum()) / 4, float(work.max())

    for slowest, mean, most in simulate(3, on_rank):
        assert slowest <= mean + most


def test_axes_count_from_the_end():
    def on_rank():
        mesh = make_mesh((1, 2))
        b = balance.Balancer(9, mesh, axes=[-1], speeds=[2, 1])
        x = st.distribute_tensor(torch.ones(9), mesh, [Replicate(), Shard(0)], src_data_rank=None)
        return b.axes, tuple(b.cut(x).spec.dims[0].sizes)

    assert simulate(2, on_rank) == [((1,), (6, 3))] * 2

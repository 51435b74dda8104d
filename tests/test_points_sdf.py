"""Signed distances: shapes with known ones, a search over barycentric grids, and shardings."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ops.points.triangle import closest

torch.manual_seed(0)
D = torch.float64
BOX = torch.tensor(list(itertools.product([-1.0, 1.0], [-2.0, 2.0], [-3.0, 3.0])), dtype=D)
FACES = torch.tensor([
    [0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
    [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3],
])  # fmt: skip
q = torch.randn(9, 3, dtype=D) * 2.5


def segment(p, a, b):
    t = np.clip(np.dot(p - a, b - a) / max(np.dot(b - a, b - a), 1e-300), 0, 1)
    return a + t * (b - a)


def on_triangle(p, a, b, c):
    """The projection if it is inside, else the closest point of the three edges."""
    n = np.cross(b - a, c - a)
    found = [segment(p, *e) for e in ((a, b), (b, c), (c, a))]
    if n @ n > 0:
        foot = p - n * ((p - a) @ n) / (n @ n)
        sides = [np.cross(v - u, foot - u) @ n for u, v in ((a, b), (b, c), (c, a))]
        if min(sides) >= 0:
            found.append(foot)
    return min(found, key=lambda x: np.sum((x - p) ** 2))


def box(q):
    """The signed distance and the closest point of a box, by its formula (Quilez)."""
    half = q.new_tensor([1.0, 2.0, 3.0])
    d = q.abs() - half
    outside = d.clamp(min=0)
    apart = outside.square().sum(1)
    inside = d.amax(1)
    value = torch.where(apart > 0, torch.where(apart > 0, apart, 1).sqrt(), inside)
    pushed = torch.where(torch.nn.functional.one_hot(d.argmax(1), 3) > 0, half * q.sign(), q)
    at = torch.where((apart > 0)[:, None], q.clamp(-half, half), pushed)
    return value, at


def test_triangles():
    """Every region of a triangle, thin ones, and ones without area."""
    g = torch.Generator().manual_seed(2)
    shapes = torch.randn(12, 3, 3, generator=g, dtype=D)
    shapes[8] = shapes[8, :1]
    shapes[9, 2] = shapes[9, 0] * 0.3 + shapes[9, 1] * 0.7
    shapes[10, 1] = shapes[10, 0]
    shapes[11, 2] = shapes[11, 1] + 1e-3
    p = torch.randn(300, 3, generator=g, dtype=D) * 2
    got = closest(p[:, None], *shapes.unbind(1))
    for i, j in itertools.product(range(300), range(12)):
        want = on_triangle(p[i].numpy(), *shapes[j].numpy())
        near = np.linalg.norm(want - p[i].numpy())
        assert abs(np.linalg.norm(got[i, j].numpy() - p[i].numpy()) - near) < 1e-9, (i, j)


def test_a_box():
    for chunk in (4, 256):
        p = torch.randn(400, 3, dtype=D) * 2.5
        d, at = st.points.signed_distance(p, BOX, FACES, chunk=chunk)
        want, place = box(p)
        assert torch.allclose(d, want, atol=1e-12) and (want < 0).sum() > 20
        assert torch.allclose(at, place, atol=1e-12)
    # a face less: a hole, but inside is inside
    middle = torch.tensor([[0.2, 0.1, -0.3], [5.0, 0, 0]], dtype=D)
    assert st.points.signed_distance(middle, BOX, FACES[1:])[0].sign().tolist() == [-1, 1]
    # turned inside out nothing is inside
    assert (st.points.signed_distance(middle, BOX, FACES.flip(1))[0] > 0).all()


def test_winding_of_a_torus():
    u, v = 24, 16
    a, b = torch.meshgrid(
        torch.arange(u) * 2 * math.pi / u, torch.arange(v) * 2 * math.pi / v, indexing="ij"
    )
    x = (
        torch.stack([(2 + b.cos()) * a.cos(), (2 + b.cos()) * a.sin(), b.sin()], -1)
        .reshape(-1, 3)
        .to(D)
    )
    i, j = torch.meshgrid(torch.arange(u), torch.arange(v), indexing="ij")
    at = lambda i, j: ((i % u) * v + j % v).reshape(-1)  # noqa: E731
    faces = torch.cat([torch.stack([at(i, j), at(i + 1, j), at(i + 1, j + 1)], 1),
                       torch.stack([at(i, j), at(i + 1, j + 1), at(i, j + 1)], 1)])  # fmt: skip
    p = torch.randn(200, 3, dtype=D) * 1.5
    exact = torch.hypot(torch.hypot(p[:, 0], p[:, 1]) - 2, p[:, 2]) - 1
    d, _ = st.points.signed_distance(p, x, faces)
    assert (d - exact).abs().max() < 0.05
    sure = exact.abs() > 0.05
    assert torch.equal(d[sure] < 0, exact[sure] < 0)


def test_gradients():
    """Against differences, for a mesh in general position, and at distance 0."""
    x = BOX + torch.randn(BOX.shape, dtype=D) * 0.2

    def fn(q, x):
        return st.points.signed_distance(q, x, FACES)

    assert torch.autograd.gradcheck(fn, (q.clone().requires_grad_(), x.requires_grad_()))
    p = x[:1].detach().clone().requires_grad_()
    d, _ = fn(p, x)
    (g,) = torch.autograd.grad(d.sum(), p)
    assert d.item() == 0 and torch.equal(g, torch.zeros_like(g))


def distance(q, x, faces):
    if any(isinstance(y, st.ShardTensor) for y in (q, faces)):
        return st.points.signed_distance(q, x, faces, chunk=5)
    d, at = box(q)
    # moving vertices moves the closest point: by the formula of a plane, an edge or a corner
    serial = st.points.signed_distance(q, x, faces)
    T.same(serial[0], d.detach(), "distance")
    T.same(serial[1], at.detach(), "closest point")
    return serial


@pytest.mark.parametrize("cut", T.cuts(12))
def test_cuts(cut):
    n = (len(cut),)
    for a in (None, T.shard(0), T.shard(0, T.cuts(9)[-1]) if len(cut) == 4 else T.replicated()):
        specs = T.hold(distance, [q, BOX, FACES], [a, None, T.shard(0, cut)], n)
        sharded = a is not None and a != T.replicated()
        assert bool(specs[0].varying) == sharded
    T.hold(distance, [q, BOX, FACES], [T.shard(0), None, None], n)


@pytest.mark.parametrize("a, b", [
    ([Shard(0), Replicate()], [Replicate(), Shard(0)]), ([Shard(0), Shard(0)], [Shard(0), Shard(0)]),
    ([Shard(0), Replicate()], [Shard(0), Shard(0)]), ([Replicate()] * 2, [Shard(0), Shard(0)]),
    ([Shard(0), Shard(1)], [Shard(1), Shard(0)]),
])  # fmt: skip
def test_mesh(a, b):
    T.hold(distance, [q, BOX, FACES], [T.On(a), None, T.On(b)], (2, 2))


def test_equal_faces():
    """Faces equally near, also far apart in the list: the first counts on any ranks."""
    twice = torch.cat([FACES, FACES.roll(1, 1)])
    places = torch.cat([q, torch.zeros(3, 3, dtype=D)])

    def fn(q, x, f):
        return st.points.signed_distance(q, x, f)

    # the middle of the box is as far from the side that comes third
    at = fn(places, BOX, twice)[1]
    assert torch.equal(at[-1], torch.tensor([-1.0, 0, 0], dtype=D))
    for a, cut in itertools.product((None, T.shard(0)), ((12, 12), (2, 22), (1, 0, 23))):
        T.hold(fn, [places, BOX, twice], [a, None, T.shard(0, cut)], (len(cut),))


def test_cost_and_mistakes():
    def sent(sharded):
        mesh = T.make_mesh((3,))
        f = st.distribute_tensor(FACES, mesh, [Shard(0)], src_data_rank=None)
        p = st.distribute_tensor(q, mesh, [Shard(0)], src_data_rank=None) if sharded else q
        with st.trace() as t:
            st.points.signed_distance(p, BOX, f)
        with pytest.raises(IndexError):
            st.points.signed_distance(p, BOX, f + (f == 7).long())
        with pytest.raises(st.UnsupportedOpError, match="full_tensor"):
            st.points.signed_distance(
                p, st.distribute_tensor(BOX, mesh, [Shard(0)], src_data_rank=None), f
            )
        return [s.bytes for s in t.sent]

    # whether all faces are right; then 2 hops of 4 faces
    assert st.simulate(3, sent, True, transport="plain") == [[16, 96, 96]] * 3
    # 6 numbers for each of 9 queries to both others, in 4 all-reduces
    assert (
        st.simulate(3, sent, False, transport="plain")
        == [[16, *(2 * n * 8 for n in (9, 9, 27, 9))]] * 3
    )
    for bad in ((q[:, :2], BOX[:, :2], FACES), (q, BOX, FACES[:0]), (q, BOX, FACES[:, :2])):
        with pytest.raises(ValueError):
            st.points.signed_distance(*bad)
